"""Packed codes in vector memory, unpacked by shifts and masks of whole words; see `pallas_kernels.packing`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.decode_attention.pallas_tpu.lanes import lane
from pallas_kernels.decode_attention.pallas_tpu.reader import own
from pallas_kernels.decode_attention.pallas_tpu.unit import dot
from pallas_kernels.packing import LOW_BITS
from pallas_kernels.rows import LANES

FLIP = -0x7F7F7F80
"""0x80808080: turns unsigned bytes into signed ones that are 128 less."""


def words(rows: Any, row: int, head: int, cut: slice = slice(None)) -> jax.Array:
    """int32 [n / 4, lanes] of n `Rows` of a head: 4 rows per word."""
    return pltpu.bitcast(rows.data[row, own(rows.data, head), cut], jnp.int32)


def planes(loader: Any, row: int, head: int, unit: Any, cut: slice = slice(None)) -> list[jax.Array]:
    """int8 [n, lanes] for each plane of the rows `cut` of a head, whole tiles.

    Args:
      loader: has `codes`, `bits` and `high` as an `IntegerLoader`; codes of 8 bits are given less 128.
      unit: a type that the matrix unit multiplies, int8 or bfloat16.
    """
    bits, found = LOW_BITS[loader.bits], words(loader.codes, row, head, cut)
    if bits == 8:
        return [pltpu.bitcast(found ^ jnp.int32(FLIP), jnp.int8)]
    mask = jnp.int32((2**bits - 1) * 0x01010101)
    low = [(found >> (bits * i)) & mask for i in range(8 // bits)]
    if loader.high is None:
        return [pltpu.bitcast(x, jnp.int8) for x in low]
    start, stop, _ = cut.indices(loader.codes.data.shape[2])
    shape = (loader.codes.width, loader.codes.fold)
    tops = [_aligned(loader.high, row, head, t, shape, unit) for t in range(start // LANES, stop // LANES)]
    high = jnp.concatenate(tops, axis=0)
    one = jnp.int32(0x01010101)
    return [pltpu.bitcast(x | (((high >> (bits * i)) & one) << bits), jnp.int8) for i, x in enumerate(low)]


def _aligned(high: Any, row: int, head: int, t: int, shape: tuple[int, int], unit: Any) -> jax.Array:
    """Words [32, lanes] of tile t of the low bits: bit 2i of a lane's byte is the high bit of its code in plane i.

    A byte of high bits holds channels half as far apart as one of low bits, so it is wanted in two lanes, and a row
    holds twice as many slots. The matrix unit moves bytes between lanes exactly.
    """
    width, fold = shape
    lanes = width * fold
    part, channel = lane((lanes, lanes)) // width, lane((lanes, lanes)) % width
    source = (t % 2 * fold + part) * (width // 2) + channel % (width // 2)
    here = jax.lax.broadcasted_iota(jnp.int32, (lanes, lanes), 0) == source
    move = jnp.where(here, 1.0, 0.0).astype(unit)
    cut = slice(t // 2 * LANES, (t // 2 + 1) * LANES)
    bytes_ = pltpu.bitcast(words(high, row, head, cut) ^ jnp.int32(FLIP), jnp.int8)
    moved = dot(bytes_.astype(unit), move).astype(jnp.int32) + 128
    odd = lane(moved.shape) % width >= width // 2
    return pltpu.bitcast((jnp.where(odd, moved >> 1, moved) & 0x55).astype(jnp.int8), jnp.int32)
