"""Numbers in the matrix unit: how float32 queries and weights meet stored numbers of another type, hardly rounded.

A matrix unit multiplies numbers of one type: int8 codes, bfloat16 or float32. The stored numbers are the large operand
and go in as they are. The small one, queries or softmax weights, is a sum of terms of that type, one more row of the
small operand each. Such rows are almost free, because loading the large operand into the unit costs more than
streaming a few rows past it.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.rows import LANES

QUERY_TOP = 127.0 * 2.0**16
"""Largest magnitude of a query as an integer of three signed bytes."""

WEIGHT_TOP = 127.0 * 2.0**24
"""The same for a weight, of four bytes: float32 has no more, so that a long tail of small weights is kept."""


def query_terms(q: jax.Array, unit: Any) -> tuple[list[jax.Array], jax.Array]:
    """Terms f32 [n, R, H] of queries of n heads, each exact in `unit`, and the factors f32 [n, 1, 1] they leave out."""
    one = jnp.ones((q.shape[0], 1, 1), jnp.float32)
    if unit == jnp.float32:
        return [q], one
    if unit == jnp.bfloat16:
        return _bfloat16_terms(q), one
    peak = jnp.max(jnp.max(jnp.abs(q), axis=1, keepdims=True), axis=2, keepdims=True)
    peak = jnp.maximum(peak, 1e-30)
    x = jnp.round(q * (QUERY_TOP / peak)).astype(jnp.int32)
    high = (x + 0x8080) >> 16
    rest = x - (high << 16)
    middle = (rest + 0x80) >> 8
    return [t.astype(jnp.float32) for t in (high, middle, rest - (middle << 8))], peak / QUERY_TOP


def terms(unit: Any) -> int:
    """How many terms a query has."""
    return {jnp.dtype(jnp.int8): 3, jnp.dtype(jnp.bfloat16): 2, jnp.dtype(jnp.float32): 1}[jnp.dtype(unit)]


def logits(products: jax.Array, unit: Any) -> jax.Array:
    """f32 [rows, n] from the products of all terms [terms · rows, n], term after term."""
    if unit == jnp.float32:
        return products
    rows = products.shape[0] // terms(unit)
    if unit == jnp.bfloat16:
        return products[:rows] + products[rows:]
    high, middle, low = (products[i * rows : (i + 1) * rows] for i in range(3))
    return ((high << 8) + middle).astype(jnp.float32) * 256.0 + low.astype(jnp.float32)


def weight_rows(unit: Any) -> int:
    """Rows of the small operand per row of weights."""
    return {jnp.dtype(jnp.int8): 4, jnp.dtype(jnp.bfloat16): 2, jnp.dtype(jnp.float32): 1}[jnp.dtype(unit)]


def weight_operand(x: jax.Array, unit: Any) -> jax.Array:
    """The small operand [weight_rows · rows, n] for weights x f32 [rows, n], at least 0.

    For int8 x is at most `WEIGHT_TOP`, and row 4r + k holds the k-th signed byte of row r: adding 128 to every byte and
    flipping its highest bit makes balanced digits in place, and the bytes of a word are neighbouring rows already.
    """
    if unit == jnp.float32:
        return x
    if unit == jnp.bfloat16:
        return jnp.concatenate(_bfloat16_terms(x), axis=0).astype(jnp.bfloat16)
    mask = jnp.int32(-0x7F7F7F80)  # 0x80808080
    return pltpu.bitcast((x.astype(jnp.int32) + mask) ^ mask, jnp.int8)


def mixed(out: jax.Array, unit: Any, scratch: Any) -> jax.Array:
    """f32 [rows, n] from the product [weight_rows · rows, n] of `weight_operand`.

    `scratch` int32 [n / 128, weight_rows · rows, 128] takes int32 products, to be read with a stride.
    """
    if unit == jnp.float32:
        return out
    if unit == jnp.bfloat16:
        rows = out.shape[0] // 2
        return out[:rows] + out[rows:]
    found = []
    for i, start in enumerate(range(0, out.shape[1], LANES)):
        part = out[:, start : start + LANES]
        scratch[i, :, : part.shape[1]] = part
        low, second, third, high = (scratch[i, k::4].astype(jnp.float32) for k in range(4))
        found.append(((high * 2.0**24 + third * 2.0**16) + (second * 2.0**8 + low))[:, : part.shape[1]])
    return jnp.concatenate(found, axis=1)


def dot(a: jax.Array, b: jax.Array, *, transposed: bool = False) -> jax.Array:
    """a @ b, or a @ b.T if `transposed`; exact products, sums in float32 or int32."""
    precision = jax.lax.Precision.HIGHEST if b.dtype == jnp.float32 else None
    result = jnp.int32 if b.dtype == jnp.int8 else jnp.float32
    axes = (((1,), (1 if transposed else 0,)), ((), ()))
    return jax.lax.dot_general(a, b, axes, precision=precision, preferred_element_type=result)


def bfloat16_pair(x: jax.Array) -> list[jax.Array]:
    """Two bfloat16 arrays whose sum is x (float32), but for its last 8 bits."""
    return [t.astype(jnp.bfloat16) for t in _bfloat16_terms(x)]


def _bfloat16_terms(x: jax.Array) -> list[jax.Array]:
    """Two float32 arrays, each exact in bfloat16, whose sum is x to 17 bits.

    Three would be exact, but are not worth their time: relative errors of 2**-18 in the terms of a sum of many.
    """
    high = x.astype(jnp.bfloat16).astype(jnp.float32)
    return [high, (x - high).astype(jnp.bfloat16).astype(jnp.float32)]
