"""A scale and an offset per channel."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.loader.base import Loader, PyTree
from pallas_kernels.loader.mapped import MappedLoader


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScaledLoader(MappedLoader):
    """x = inner * scale + offset per channel, the same for all slots.

    With codes of a shared codebook inside, KVQuant's keys (Hooper et al., 2024, arXiv:2401.18079); with integers or
    float8, static scaling per channel; with MiKV's coded keys (Yang et al., 2024, arXiv:2402.18096), 1 / balancer.
    Costs nothing per slot: keys' scales move into the queries, values' into the output.

    Attributes:
      inner: loader of the unscaled channels.
      scale: floating [K or 1, H]. [B, K or 1, H], a scale for each row, unless another loader than a map of channels
        is around this one.
      offset: as `scale`, or None for 0.
    """

    inner: Loader
    scale: jax.Array
    offset: jax.Array | None = None

    @property
    def head_dim(self) -> int:
        return self.inner.head_dim

    @property
    def per_head(self) -> PyTree:
        return self.inner.per_head, self.scale, self.offset

    def with_slots(self, slots: PyTree) -> ScaledLoader:
        return ScaledLoader(self.inner.with_slots(slots), self.scale, self.offset)

    def decode(self) -> jax.Array:
        return self.map_sums(self.inner.decode(), jnp.float32(1.0))

    def map_queries(self, queries: jax.Array) -> tuple[jax.Array, jax.Array | float]:
        bias = 0.0 if self.offset is None else jnp.sum(queries * _spread(self.offset), axis=-1, keepdims=True)
        return queries * _spread(self.scale), bias

    def map_sums(self, sums: jax.Array, total: jax.Array) -> jax.Array:
        scaled = sums * _spread(self.scale)
        return scaled if self.offset is None else scaled + total * _spread(self.offset)


def _spread(x: jax.Array) -> jax.Array:
    """f32 [K or 1, 1, H], which broadcasts over slots or queries."""
    return x.astype(jnp.float32)[..., None, :]
