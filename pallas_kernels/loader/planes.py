"""What loaders of packed codes have in common."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pallas_kernels.loader.base import Loader, dot, mix
from pallas_kernels.packing import LOW_BITS
from pallas_kernels.rows import Rows, tile


class PlanesLoader(Loader):
    """Codes of a few bits, packed in planes: runs of channels that share their bytes (`packing`).

    Subclasses have the fields `codes`, `bits` and `high`, the last for codes of 3 bits alone.
    """

    codes: Rows
    bits: int
    high: Rows | None

    @property
    def granularity(self) -> int:
        tiles = (tile(rows.fold) for rows in (self.codes, self.high) if rows is not None)
        return math.lcm(self.block, *tiles) // self.block

    @property
    def head_dim(self) -> int:
        return self.codes.width * 8 // LOW_BITS[self.bits]

    @property
    def count(self) -> int:
        return self.codes.slots


def dot_planes(queries: jax.Array, planes: Sequence[jax.Array]) -> jax.Array:
    """f32 [..., R, S]: inner products of queries [..., R, H] with slots whose channels are those of all planes."""
    first, *rest = (dot(q, p) for q, p in zip(jnp.split(queries, len(planes), axis=-1), planes, strict=True))
    return sum(rest, start=first)


def mix_planes(weights: jax.Array, planes: Sequence[jax.Array]) -> jax.Array:
    """f32 [..., R, H]: slots summed with weights [..., R, S], plane by plane."""
    return jnp.concatenate([mix(weights, plane) for plane in planes], axis=-1)
