"""Keys stored before rotary embedding."""

from __future__ import annotations

import dataclasses

import jax

from pallas_kernels.loader.base import Loader, PyTree
from pallas_kernels.rope import Rope


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RotatedLoader(Loader):
    """Keys that are stored before rotary embedding and rotated when they are read.

    Attributes:
      inner: loader of the unrotated keys.
      positions: int32 [..., S], one per slot; a head axis of 1 shares them, and the rotation's cost, among heads.
      rope: the rotary table.
    """

    inner: Loader
    positions: jax.Array
    rope: Rope

    @property
    def block(self) -> int:
        return self.inner.block

    @property
    def granularity(self) -> int:
        return self.inner.granularity

    @property
    def head_dim(self) -> int:
        return self.inner.head_dim

    @property
    def slots(self) -> PyTree:
        return self.inner.slots, self.positions

    @property
    def per_head(self) -> PyTree:
        return self.inner.per_head

    @property
    def count(self) -> int:
        return self.inner.count

    def with_slots(self, slots: PyTree) -> RotatedLoader:
        inner, positions = slots
        return RotatedLoader(self.inner.with_slots(inner), positions, self.rope)

    def decode(self) -> jax.Array:
        return self.rope.rotate(self.inner.decode(), self.positions)
