"""Packed integers without scales of their own."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.loader.base import PyTree, static
from pallas_kernels.loader.planes import PlanesLoader, dot_planes, mix_planes
from pallas_kernels.packing import join_planes
from pallas_kernels.rows import Rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FixedLoader(PlanesLoader):
    """x = code - 2**(bits - 1): integers around 0. `ScaledLoader(FixedLoader(…), scale)` scales each channel.

    Attributes:
      codes: rows of H·bits/8 uint8 per slot, planes as in `packing`; of 3 bits, the low 2.
      bits: bits per code, 8, 4, 3 or 2.
      high: rows of H/8 uint8 per slot, the high bits of codes of 3 bits; None for others.
    """

    codes: Rows
    bits: int = static()
    high: Rows | None = None

    @property
    def block(self) -> int:
        return 1

    @property
    def slots(self) -> PyTree:
        return self.codes, self.high

    def with_slots(self, slots: PyTree) -> FixedLoader:
        codes, high = slots
        return FixedLoader(codes, self.bits, high)

    def decode(self) -> jax.Array:
        return jnp.concatenate(self._planes(), axis=-1)

    def dot(self, queries: jax.Array) -> jax.Array:
        return dot_planes(queries, self._planes())

    def mix(self, weights: jax.Array, valid: jax.Array | None) -> jax.Array:
        return mix_planes(weights, self._planes())  # codes are always finite

    def _planes(self) -> list[jax.Array]:
        """Integers of the channels of each plane, f32 [..., S, P]."""
        high = None if self.high is None else self.high.natural()
        planes = join_planes(self.codes.natural(), high, self.bits)
        return [plane.astype(jnp.float32) - 2.0 ** (self.bits - 1) for plane in planes]
