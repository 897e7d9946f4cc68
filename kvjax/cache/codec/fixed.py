"""Integers around 0 without scales of their own."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from kvjax.cache.codec.base import Codec
from kvjax.cache.codec.numbers import whole_bytes
from kvjax.errors import UsageError
from kvjax.typing import Array, PyTree
from pallas_kernels.loader import FixedLoader
from pallas_kernels.packing import split
from pallas_kernels.rows import Rows

BITS = (8, 4, 3, 2)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FixedStore:
    """H·bits/8 uint8 per token, packed in planes; of 3 bits the low 2, and H/8 uint8 with the high ones in `high`."""

    codes: Rows
    high: Rows | None


@dataclasses.dataclass(frozen=True)
class Fixed(Codec):
    """x is kept as the nearest integer from -`limit` to `limit` = 2**(bits - 1) - 1; what lies beyond saturates.

    The format inside `PerChannel`, where a scale makes x fit. Bits per element: `bits`. NaN becomes 0.

    Attributes:
      bits: 8, 4, 3 or 2.

    Raises:
      UsageError: no such number of bits.
    """

    bits: int = 8

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise UsageError(f"Fixed codes have {', '.join(map(str, BITS))} bits; got bits={self.bits!r}")

    @property
    def block(self) -> int:
        return 1

    @property
    def limit(self) -> float:
        """Largest magnitude that does not saturate."""
        return 2.0 ** (self.bits - 1) - 1

    def validate(self, head_dim: int) -> None:
        whole_bytes(head_dim, self.bits)

    def encode(self, x: Array, params: PyTree = None) -> FixedStore:
        self.validate(x.shape[-1])
        x = x.astype(jnp.float32)
        inside = jnp.where(jnp.isnan(x), 0.0, jnp.clip(x, -self.limit, self.limit))
        low, high = split((jnp.round(inside) + 2 ** (self.bits - 1)).astype(jnp.uint8), self.bits)
        return FixedStore(Rows.of(low), None if high is None else Rows.of(high))

    def loader(self, store: FixedStore, params: PyTree = None) -> FixedLoader:
        return FixedLoader(store.codes, self.bits, store.high)

    def error_bound(self, store: FixedStore) -> Array:
        """f32 [..., S, H]: no element within ±`limit` is further than this from what it decodes to."""
        return jnp.full(self.loader(store).decode().shape, 0.5, jnp.float32)
