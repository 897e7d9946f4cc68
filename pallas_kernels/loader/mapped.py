"""What loaders have in common that store other channels than attention sees."""

from __future__ import annotations

import abc

import jax

from pallas_kernels.loader.base import Loader, PyTree


class MappedLoader(Loader):
    """A linear map of the channels of another loader, the same for all slots.

    Subclasses have a field `inner` and give the map three times: `decode`, and applied to queries and to sums.
    """

    inner: Loader

    @abc.abstractmethod
    def map_queries(self, queries: jax.Array) -> tuple[jax.Array, jax.Array | float]:
        """As `to_core`, for `inner` instead of the core."""

    @abc.abstractmethod
    def map_sums(self, sums: jax.Array, total: jax.Array) -> jax.Array:
        """As `from_core`, for `inner` instead of the core."""

    @property
    def block(self) -> int:
        return self.inner.block

    @property
    def granularity(self) -> int:
        return self.inner.granularity

    @property
    def slots(self) -> PyTree:
        return self.inner.slots

    @property
    def count(self) -> int:
        return self.inner.count

    @property
    def core(self) -> Loader:
        return self.inner.core

    def to_core(self, queries: jax.Array) -> tuple[jax.Array, jax.Array | float]:
        queries, outer = self.map_queries(queries)
        queries, inner = self.inner.to_core(queries)
        return queries, outer + inner

    def from_core(self, sums: jax.Array, total: jax.Array) -> jax.Array:
        return self.map_sums(self.inner.from_core(sums, total), total)

    @property
    def reads_in_place(self) -> bool:
        return self.core.reads_in_place

    def dot(self, queries: jax.Array) -> jax.Array:
        queries, bias = self.to_core(queries)
        return self.core.dot(queries) + bias

    def mix(self, weights: jax.Array, valid: jax.Array | None) -> jax.Array:
        return self.from_core(self.core.mix(weights, valid), weights.sum(axis=-1, keepdims=True))
