"""What the kernel asks of one warpgroup of a GPU, and what stands for it where a kernel is interpreted.

The Mosaic GPU interpreter runs grids, copies, barriers and arithmetic. Layouts in registers mean nothing to it, and in
JAX 0.10 it knows neither transposed references nor matrix products of registers; these few operations have a plain
form for it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.compat import is_interpreted_gpu, load_fragment, store_fragment

TILE = plgpu.Layout.WGMMA
"""[64 · m, 8 · n]: what a matrix product takes from registers and leaves there."""

ROWS = plgpu.Layout.WGMMA.reduce(1)
"""[64 · m]: one number per row of a `TILE`."""

COLUMNS = plgpu.Layout.WGMMA.reduce(0)
"""[8 · n]: one number per column of a `TILE`."""

FLIPPED = plgpu.Layout.WGMMA_TRANSPOSED


def load(ref: Any, layout: Any) -> jax.Array:
    """The array that `ref` (shared memory, or a little of global memory) holds."""
    return ref[...] if is_interpreted_gpu() else load_fragment(ref, layout, optimized=layout is TILE)


def load_once(ref: Any, layout: Any) -> jax.Array:
    """`load` from global memory."""
    return ref[...] if is_interpreted_gpu() else load_fragment(ref, layout, optimized=False)


def store_once(ref: Any, x: jax.Array) -> None:
    """Writes `x` to global memory."""
    if is_interpreted_gpu():
        ref[...] = x
    else:
        store_fragment(ref, x)


def span(ref: Any, begin: int, count: int) -> Any:
    """Reference to `count` columns."""
    return ref.at[:, begin : begin + count]


def cast(x: jax.Array, layout: Any) -> jax.Array:
    """`x` in another layout."""
    return x if is_interpreted_gpu() else plgpu.layout_cast(x, layout)


def full(shape: tuple[int, ...], value: float, layout: Any) -> jax.Array:
    """f32 constant."""
    return cast(jnp.full(shape, value, jnp.float32), layout)


def index(shape: tuple[int, ...], axis: int, layout: Any) -> jax.Array:
    """int32 index along `axis`."""
    return cast(jax.lax.broadcasted_iota(jnp.int32, shape, axis), layout)


def along_rows(x: jax.Array, like: jax.Array) -> jax.Array:
    """[n] of `ROWS` as a `TILE` of the shape of `like`: x[i] everywhere in row i."""
    return jax.lax.broadcast_in_dim(x, like.shape, (0,))


def along_columns(x: jax.Array, like: jax.Array) -> jax.Array:
    """[n] of `COLUMNS` as a `TILE` of the shape of `like`: x[j] everywhere in column j."""
    return jax.lax.broadcast_in_dim(x, like.shape, (1,))


def as_signed(x: jax.Array) -> jax.Array:
    """The same bytes, uint8 as int8."""
    # In JAX 0.10 Mosaic GPU goes on treating what a bitcast between the two gives as unsigned; a cast it gets right.
    return jax.lax.bitcast_convert_type(x, jnp.int8) if is_interpreted_gpu() else x.astype(jnp.int8)


def columns(x: jax.Array, begin: int, count: int) -> jax.Array:
    """`count` columns, a multiple of 8 that begins at one."""
    return jax.lax.slice(x, (0, begin), (x.shape[0], begin + count))


def store_flipped(ref: Any, x: jax.Array) -> None:
    """Writes the transpose of the `TILE` `x` of 16-bit numbers."""
    if is_interpreted_gpu():
        ref[...] = x.T
    else:
        plgpu.transpose_ref(ref, (1, 0))[...] = plgpu.layout_cast(x, FLIPPED)


def products(
    shape: tuple[int, int], count: int, terms: Callable[[int], Sequence[tuple[Any, bool, Any]]]
) -> tuple[jax.Array, ...]:
    """`count` arrays f32 `shape` [64 · m, 8 · n]: the sum of all left @ right.T of `terms(i)`, in float32.

    Args:
      shape: of each.
      count: how many; all are computed at once.
      terms: (left, flipped, right) with left [64 · m, k] in registers, or a reference to it, or with `flipped` to its
        transpose; right is a reference [8 · n, k].
    """
    if is_interpreted_gpu():
        found = tuple(_plain_sum(terms(i)) for i in range(count))
        plgpu.commit_smem()  # the matrix unit reads as copies write, so that nothing has to be ordered between them
        return found

    def issue(*sums: Any) -> tuple[jax.Array, ...]:
        for i, ref in enumerate(sums):
            for left, flipped, right in terms(i):
                a = plgpu.transpose_ref(left, (1, 0)) if flipped else left
                plgpu.wgmma(ref, a, plgpu.transpose_ref(right, (1, 0)))
        return tuple(ref[...] for ref in sums)

    return tuple(pl.run_scoped(issue, *[plgpu.WGMMAAccumulatorRef(shape, jnp.float32)] * count))


def _plain_sum(terms: Sequence[tuple[Any, bool, Any]]) -> jax.Array:
    parts = []
    for left, flipped, right in terms:
        a = left[...].T if flipped else left[...]
        parts.append(jnp.dot(a.astype(jnp.float32), right[...].astype(jnp.float32).T))
    return functools.reduce(jnp.add, parts)


def split(x: jax.Array, count: int) -> list[jax.Array]:
    """`count` bfloat16 arrays whose sum is nearly `x`, float32; inside the kernel."""
    if is_interpreted_gpu():
        return split_exactly(x, count)
    terms = []
    for _ in range(count):
        terms.append(x.astype(jnp.bfloat16))
        x = x - terms[-1].astype(jnp.float32)
    return terms


def split_exactly(x: jax.Array, count: int) -> list[jax.Array]:
    """`split` for XLA, which may take a cast to and fro for none at all."""
    terms = []
    for _ in range(count):
        term = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
        terms.append(term.astype(jnp.bfloat16))
        x = x - term
    return terms
