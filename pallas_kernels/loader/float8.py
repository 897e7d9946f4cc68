"""Floating numbers of 8 bits."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from pallas_kernels.loader.base import Loader, PyTree, dot, mix, static
from pallas_kernels.rows import Rows, tile

FORMATS = {"e4m3": jnp.float8_e4m3fn, "e5m2": jnp.float8_e5m2}
"""Exponent and mantissa bits; e4m3 ends at 448 and has no infinities (Micikevicius et al., 2022, arXiv:2209.05433)."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Float8Loader(Loader):
    """x = float8 * scale. A scale per channel, the same for all slots, is `ScaledLoader(Float8Loader(…), scale)`.

    Attributes:
      codes: rows of H uint8 per slot, the bits of the numbers. XLA on a CPU would widen an array of float8 to write
        one slot of it, and leaves bytes alone.
      format: 'e4m3' or 'e5m2'.
      scale: floating [..., S], a factor per slot; None for 1.
    """

    codes: Rows
    format: Literal["e4m3", "e5m2"] = static()
    scale: jax.Array | None = None

    @property
    def block(self) -> int:
        return 1

    @property
    def granularity(self) -> int:
        return tile(self.codes.fold)

    @property
    def head_dim(self) -> int:
        return self.codes.width

    @property
    def slots(self) -> PyTree:
        return self.codes, self.scale

    @property
    def count(self) -> int:
        return self.codes.slots

    def with_slots(self, slots: PyTree) -> Float8Loader:
        codes, scale = slots
        return Float8Loader(codes, self.format, scale)

    def decode(self) -> jax.Array:
        return self._numbers() if self.scale is None else self._numbers() * self.scale.astype(jnp.float32)[..., None]

    def dot(self, queries: jax.Array) -> jax.Array:
        products = dot(queries, self._numbers())
        return products if self.scale is None else products * self.scale.astype(jnp.float32)[..., None, :]

    def mix(self, weights: jax.Array, valid: jax.Array | None) -> jax.Array:
        numbers = self._numbers()
        if valid is not None:  # bits of nothing in particular may be a NaN
            numbers = jnp.where(valid[..., None], numbers, 0.0)
        if self.scale is not None:
            scale = self.scale.astype(jnp.float32)
            weights = weights * (scale if valid is None else jnp.where(valid, scale, 0.0))[..., None, :]
        return mix(weights, numbers)

    def _numbers(self) -> jax.Array:
        """f32 [..., S, H] before the scale."""
        return jax.lax.bitcast_convert_type(self.codes.natural(), FORMATS[self.format]).astype(jnp.float32)
