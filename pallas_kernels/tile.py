"""What TPU kernels do with a tile in registers: products, and moving one number per row between lanes and rows."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

LOG2E = math.log2(math.e)
LANES = 128
LOWEST = -1e30
"""Where a running maximum starts: finite, so that exp2(masked - maximum) is exp2(-inf), never exp2(-inf + inf)."""


def index(start: Any, count: int, axis: int) -> jax.Array:
    """start, start + 1, … as int32 [count, 1] (axis 0) or [1, count] (axis 1)."""
    shape = (count, 1) if axis == 0 else (1, count)
    return start + jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def dot(a: jax.Array, b: jax.Array, transposed: bool = False) -> jax.Array:
    """a @ b, or a @ b.T if `transposed`: operands as they are (float32 exactly), sums in float32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    axes = (((1,), (1 if transposed else 0,)), ((), ()))
    return jax.lax.dot_general(a, b, axes, precision=precision, preferred_element_type=jnp.float32)


def scaled(products: jax.Array, scale: float, softcap: float | None) -> jax.Array:
    """Products to scaled and capped logits in base 2, that is times log2 e."""
    if softcap is None:
        return products * (scale * LOG2E)
    return jnp.tanh(products * (scale / softcap)) * (softcap * LOG2E)


def wide(x: jax.Array, width: int) -> jax.Array:
    """[n, 128] whose lanes are all equal -> [n, width]."""
    if width <= LANES:
        return x[:, :width]
    whole, rest = divmod(width, LANES)
    return jnp.concatenate([x] * whole + ([x[:, :rest]] if rest else []), axis=1)


def fold(x: jax.Array, join: Callable[[jax.Array, jax.Array], jax.Array] = jnp.add) -> jax.Array:
    """Partial sums (or what else `join` makes of two) over lanes: [n, m * 128] -> [n, 128]."""
    return functools.reduce(join, (x[:, c : c + LANES] for c in range(0, x.shape[1], LANES)))


def to_columns(ref: Any) -> jax.Array:
    """A ref [groups, queries] -> [groups * queries, 128], one number per row in all lanes."""
    groups, queries = ref.shape
    return jnp.concatenate([jnp.broadcast_to(ref[g : g + 1], (LANES, queries)).T for g in range(groups)], axis=0)


def to_rows(ref: Any, x: jax.Array) -> None:
    """Inverse of `to_columns`: writes [groups * queries, 128] to a ref [groups, queries]."""
    groups, queries = ref.shape
    for g in range(groups):
        ref[g : g + 1] = x[g * queries : (g + 1) * queries].T[:1]
