"""`cache_update` for TPUs: the tile around a block is read, blended and written back to where it came from.

XLA writes one (row, head) after the other; here the tiles of all of them stream through the kernel's pipeline. Leaves
whose entries lie along the lanes (scales and positions, [B, K, n']) are small and left to XLA.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.cache_update import xla
from pallas_kernels.rows import LANES, Rows, each, tile

PyTree = Any


def run(store: PyTree, fresh: PyTree, block: jax.Array) -> PyTree:
    """See `api.cache_update`."""
    leaves = zip(*(jax.tree.leaves(x, is_leaf=lambda x: isinstance(x, Rows)) for x in (store, fresh)), strict=True)
    if not any(_fits(*pair) for pair in leaves):
        raise NotImplementedError("no leaf has whole tiles of 128 lanes for a kernel to write")
    return each(lambda leaf, new: (_write if _fits(leaf, new) else xla.write)(leaf, new, block), store, fresh)


def _tile_rows(dtype: Any) -> int:
    """Rows of a tile: 8 of four bytes, and more of what is narrower."""
    return 32 // jnp.dtype(dtype).itemsize


def _fits(leaf: Any, new: Any) -> bool:
    """Whether whole tiles surround every block of the leaf."""
    data, entries = (leaf.data, new.slots) if isinstance(leaf, Rows) else (leaf, new.shape[2])
    if data.ndim != 4 or data.shape[3] % LANES or data.dtype.itemsize > 4:
        return False
    rows = _tile_rows(data.dtype)
    aligned = rows % entries == 0 or entries % rows == 0
    return aligned and data.shape[2] % max(rows, entries) == 0 and (entries <= LANES or not isinstance(leaf, Rows))


def _write(leaf: Any, new: Any, block: jax.Array) -> Any:
    if not isinstance(leaf, Rows):
        return _blend(leaf, new, block, fold=1)
    return Rows(_blend(leaf.data, new.natural(), block, leaf.fold), leaf.width)


def _blend(data: jax.Array, new: jax.Array, block: jax.Array, fold: int) -> jax.Array:
    """data [B, K, R, C] with new [B, K, n, C / fold] in its block."""
    batch, heads, rows, columns = data.shape
    entries = new.shape[2]
    size = max(_tile_rows(data.dtype), entries)
    # Repeated until they fill the piece, so that the kernel only selects.
    new = jnp.broadcast_to(new, (batch, heads, *new.shape[2:])).astype(data.dtype)
    new = jnp.tile(new, (1, 1, size // entries, fold))
    slot = jnp.broadcast_to(block[:, : max(1, min(heads, block.shape[1]))], (batch, heads)) * entries
    within = slot % tile(fold)
    row = slot if fold == 1 else slot // tile(fold) * LANES + within % LANES
    part = within // LANES if fold > 1 else jnp.zeros_like(slot)

    def at(b: Any, k: Any, row: Any, part: Any) -> tuple[Any, ...]:
        return b, k, jnp.minimum(row[b, k] // size, rows // size - 1), 0

    piece = pl.BlockSpec((1, 1, size, columns), at)
    return pl.pallas_call(
        functools.partial(_kernel, entries, rows, columns // fold),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, heads),
            in_specs=[pl.BlockSpec((1, 1, size, columns), lambda b, k, row, part: (b, k, 0, 0)), piece],
            out_specs=piece,
        ),
        # Or XLA may bring the whole store into vector memory, and back, for the sake of one piece.
        out_shape=pltpu.HBM(data.shape, data.dtype),
        input_output_aliases={3: 0},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        name="cache_update",
    )(row, part, new, data)


def _kernel(
    entries: int, rows: int, width: int, row_ref: Any, part_ref: Any, new_ref: Any, old_ref: Any, out_ref: Any
) -> None:
    b, k = pl.program_id(0), pl.program_id(1)
    row, part = row_ref[b, k], part_ref[b, k]
    size, columns = old_ref.shape[2:]
    at_row = jax.lax.broadcasted_iota(jnp.int32, (size, columns), 0) - row % size
    at_column = jax.lax.broadcasted_iota(jnp.int32, (size, columns), 1) - part * width
    chosen = (at_row >= 0) & (at_row < entries) & (at_column >= 0) & (at_column < width) & (row < rows)
    # Selected in 32 bits, for which every generation has masks.
    wide = jnp.int32 if jnp.issubdtype(old_ref.dtype, jnp.integer) else jnp.float32
    blended = jnp.where(chosen, new_ref[0, 0].astype(wide), old_ref[0, 0].astype(wide))
    out_ref[0, 0] = blended.astype(out_ref.dtype)
