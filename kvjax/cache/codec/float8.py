"""Floating numbers of 8 bits (Micikevicius et al., 2022, "FP8 Formats for Deep Learning", arXiv:2209.05433)."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from kvjax.cache.codec.base import Codec
from kvjax.cache.codec.scale import LIMIT, least_scale
from kvjax.errors import unknown
from kvjax.typing import Array, PyTree
from pallas_kernels.loader import Float8Loader
from pallas_kernels.loader.float8 import FORMATS
from pallas_kernels.rows import Rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Float8Store:
    """Float8 numbers and their scales, as `pallas_kernels.Float8Loader` reads them.

    Attributes:
      codes: H uint8 per token, the bits of the numbers.
      scale: bfloat16 [..., S], or None where numbers are stored as they are.
    """

    codes: Rows
    scale: Array | None


@dataclasses.dataclass(frozen=True)
class Float8(Codec):
    """x is kept as `number * scale`, a number being the nearest of the format, ties to even.

    The relative error is at most 2**-4 (e4m3) or 2**-3 (e5m2) down to the smallest normal number, and half the smallest
    number below it: `error_bound`. Elements beyond ±`limit` saturate: in e4m3, which has no infinity, conversion alone
    would make them NaN. Elements that are not finite take no part in the scale; infinities saturate, NaN becomes 0.

    Attributes:
      format: 'e4m3' (up to 448) or 'e5m2' (up to 57344).
      scale: 'token' gives each token a bfloat16 scale, by which its largest magnitude is the largest number; 'none'
        stores the numbers as they are, in exactly 8 bits.

    Raises:
      UsageError: an attribute has no such value.
    """

    format: Literal["e4m3", "e5m2"] = "e4m3"
    scale: Literal["token", "none"] = "token"

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise unknown("format of Float8", self.format, FORMATS)
        if self.scale not in ("token", "none"):
            raise unknown("scale of Float8", self.scale, ("token", "none"))

    @property
    def block(self) -> int:
        return 1

    @property
    def limit(self) -> float:
        """Largest magnitude that does not saturate."""
        return self._largest if self.scale == "none" else LIMIT

    def validate(self, head_dim: int) -> None:
        """Every head_dim can be stored."""

    def encode(self, x: Array, params: PyTree = None) -> Float8Store:
        x = x.astype(jnp.float32)
        scale = None if self.scale == "none" else self._scale(x)
        x = jnp.where(jnp.isnan(x), 0.0, jnp.clip(x, -self.limit, self.limit))
        if scale is not None:
            x = x / scale.astype(jnp.float32)[..., None]
        numbers = jnp.clip(x, -self._largest, self._largest).astype(FORMATS[self.format])
        return Float8Store(Rows.of(jax.lax.bitcast_convert_type(numbers, jnp.uint8)), scale)

    def loader(self, store: Float8Store, params: PyTree = None) -> Float8Loader:
        return Float8Loader(store.codes, self.format, store.scale)

    def error_bound(self, store: Float8Store) -> Array:
        """f32 [..., S, H]: no element within ±`limit` is further than this from what it decodes to.

        Half the distance to the next number of larger magnitude, and the float32 rounding of scaling to and fro.
        """
        info = jnp.finfo(FORMATS[self.format])
        numbers = Float8Loader(store.codes, self.format).decode()
        exponent = jnp.maximum(jnp.frexp(numbers)[1] - 1, info.minexp)
        bound = jnp.ldexp(jnp.float32(0.5), exponent - info.nmant) + 2.0**-22 * jnp.abs(numbers)
        return bound if store.scale is None else bound * store.scale.astype(jnp.float32)[..., None]

    @property
    def _largest(self) -> float:
        return float(jnp.finfo(FORMATS[self.format]).max)

    def _scale(self, x: Array) -> Array:
        """bfloat16 [..., S] for x [..., S, H].

        At least so large that half the smallest number times the scale is a normal float32.
        """
        top = jnp.max(jnp.where(jnp.isfinite(x), jnp.clip(jnp.abs(x), 0.0, LIMIT), 0.0), axis=-1)
        smallest = float(jnp.finfo(FORMATS[self.format]).smallest_subnormal)
        return least_scale(top / self._largest, 2.0**-125 / smallest)
