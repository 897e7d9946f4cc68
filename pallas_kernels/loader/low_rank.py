"""Latents of a few channels, from which those of each head are made."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.loader.base import Loader, PyTree
from pallas_kernels.loader.mapped import MappedLoader


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRankLoader(MappedLoader):
    """x = latent @ up: r stored channels, commonly joint over heads, and an up-projection for each head.

    Values, and keys that are stored as they are compared, are never made: queries are projected to r channels, and
    sums of latents to H, once. Keys that are rotated when they are read have to be: `RotatedLoader(LowRankLoader(…))`
    rebuilds a run of blocks at a time.

    CSKV (Wang et al., 2024, arXiv:2409.10593) stores keys to be rotated and values; a joint projection of rotated keys
    (Yu et al., 2024, arXiv:2406.07056) needs no rotation any more; for MLA see `ConcatLoader`.

    Attributes:
      inner: loader of the latents, r channels; head axis 1 where all heads share them.
      up: floating [K or 1, r, H].
    """

    inner: Loader
    up: jax.Array

    @property
    def head_dim(self) -> int:
        return self.up.shape[-1]

    @property
    def per_head(self) -> PyTree:
        return self.inner.per_head, self.up

    def with_slots(self, slots: PyTree) -> LowRankLoader:
        return LowRankLoader(self.inner.with_slots(slots), self.up)

    def decode(self) -> jax.Array:
        return jnp.einsum("...sc,...ch->...sh", self.inner.decode(), self.up.astype(jnp.float32))

    def map_queries(self, queries: jax.Array) -> tuple[jax.Array, jax.Array | float]:
        return jnp.einsum("...rh,...ch->...rc", queries, self.up.astype(jnp.float32), precision="highest"), 0.0

    def map_sums(self, sums: jax.Array, total: jax.Array) -> jax.Array:
        return jnp.einsum("...rc,...ch->...rh", sums, self.up.astype(jnp.float32), precision="highest")
