"""Some of the channels; the others are 0."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.loader.base import Loader, PyTree, static
from pallas_kernels.loader.mapped import MappedLoader


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SubsetLoader(MappedLoader):
    """C of H channels are stored, the same for all slots; the others read as 0 (ThinK, Xu et al., arXiv:2407.21018).

    Costs nothing per slot: a query gives up the channels that are not there before it meets the slots.

    Attributes:
      inner: loader of the C channels.
      index: int32 [K or 1, C], their numbers, each once. [B, K or 1, C], others for each row, unless another loader
        than a map of channels is around this one.
      width: H.
    """

    inner: Loader
    index: jax.Array
    width: int = static()

    @property
    def head_dim(self) -> int:
        return self.width

    @property
    def per_head(self) -> PyTree:
        return self.inner.per_head, self.index

    def with_slots(self, slots: PyTree) -> SubsetLoader:
        return SubsetLoader(self.inner.with_slots(slots), self.index, self.width)

    def decode(self) -> jax.Array:
        return self.map_sums(self.inner.decode(), jnp.float32(1.0))

    def map_queries(self, queries: jax.Array) -> tuple[jax.Array, jax.Array | float]:
        return _pick(queries, self.index), 0.0

    def map_sums(self, sums: jax.Array, total: jax.Array) -> jax.Array:
        place = self.index[..., None] == jnp.arange(self.width)  # [..., C, H]
        channel = jnp.where(place.any(-2), jnp.argmax(place, axis=-2), self.index.shape[-1])  # C where not stored
        padded = jnp.pad(sums, [(0, 0)] * (sums.ndim - 1) + [(0, 1)])
        return _pick(padded, channel)


def _pick(x: jax.Array, index: jax.Array) -> jax.Array:
    """[..., n, C] of x [..., n, H] at index [K or 1, C] or [B, K or 1, C]."""
    index = index[..., None, :]
    lead = jnp.broadcast_shapes(x.shape[:-1], index.shape[:-1])
    x, index = jnp.broadcast_to(x, (*lead, x.shape[-1])), jnp.broadcast_to(index, (*lead, index.shape[-1]))
    return jnp.take_along_axis(x, index, axis=-1, mode="clip")
