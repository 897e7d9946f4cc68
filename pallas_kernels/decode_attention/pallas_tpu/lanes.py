"""Moving numbers between the lanes of slot-wise arrays and the rows of matrices; parts and tiles as in `rows`."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.rows import LANES

SUBLANES = 8


def up(number: int, multiple: int) -> int:
    """`number` rounded up."""
    return -(-number // multiple) * multiple


def lane(shape: tuple[int, ...]) -> jax.Array:
    """int32, each element's index on the last axis."""
    return jax.lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1)


def spread(chunk: Callable[[int], jax.Array], pieces: int, queries: int) -> jax.Array:
    """[pieces · queries, 128]: row p · queries + r is `chunk(p)`, [1, 128]; the number of rows is a multiple of 8."""
    if queries % SUBLANES == 0:
        return jnp.concatenate([jnp.broadcast_to(chunk(p), (queries, LANES)) for p in range(pieces)], axis=0)
    row = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 0)
    each, blocks = SUBLANES // queries, []
    for first in range(0, pieces, each):
        x = jnp.broadcast_to(chunk(first), (SUBLANES, LANES))
        for i in range(1, each):
            x = jnp.where(row >= i * queries, jnp.broadcast_to(chunk(first + i), (SUBLANES, LANES)), x)
        blocks.append(x)
    return jnp.concatenate(blocks, axis=0)


def refold(x: jax.Array, heads: int, queries: int, fold: int, other: int) -> jax.Array:
    """Slots of x [heads · fold · queries, n], whose rows are (head, part, query), in rows for another fold."""
    if fold == other:
        return x
    chunks = x.shape[1] // LANES * fold

    def rows(head: int, part: int) -> jax.Array:
        at = [(head * fold + c % fold, c // fold) for c in range(part, chunks, other)]
        cut = [x[r * queries : (r + 1) * queries, c * LANES : (c + 1) * LANES] for r, c in at]
        return jnp.concatenate(cut, axis=1)

    return jnp.concatenate([rows(head, part) for head in range(heads) for part in range(other)], axis=0)


def columns(chunk: Callable[[int], jax.Array], fold: int, width: int) -> jax.Array:
    """f32 [128, fold · width], a tile: the number of a slot in the lanes of that slot.

    `chunk(j)` is f32 [1, 128], the numbers of the slots of part j.
    """
    whole = up(fold * width, LANES)
    part = lane((LANES, whole)) // width
    x = _column(chunk(0), whole)
    for j in range(1, fold):
        x = jnp.where(part >= j, _column(chunk(j), whole), x)
    return x[:, : fold * width]


def _column(row: jax.Array, width: int) -> jax.Array:
    """[128, width] whose columns are `row` [1, 128]."""
    x = jnp.broadcast_to(row, (LANES, LANES)).T
    return x if width == LANES else jnp.concatenate([x] * (width // LANES), axis=1)


def wide(x: jax.Array, width: int) -> jax.Array:
    """[n, 128] whose lanes are all equal -> [n, width]."""
    return jnp.concatenate([x] * (up(width, LANES) // LANES), axis=1)[:, :width] if width != LANES else x


def placement(dim: int, plane: int, fold: int, width: int) -> jax.Array:
    """bf16 [dim, fold · width], 0 or 1: x @ it puts the channels of a plane into the lanes of every part."""
    shape = (dim, fold * width)
    channel = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    return (channel == plane * width + lane(shape) % width).astype(jnp.bfloat16)
