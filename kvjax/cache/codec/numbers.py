"""What several codecs do with numbers: keep them finite, find their norm, name the nearest entry, fill bytes."""

from __future__ import annotations

import math

import jax.numpy as jnp

from kvjax.cache.codec.scale import LIMIT
from kvjax.errors import UsageError
from kvjax.typing import Array


def finite(x: Array, limit: float = LIMIT) -> Array:
    """f32 x: NaN is 0, and all lie within ±limit."""
    x = x.astype(jnp.float32)
    return jnp.where(jnp.isnan(x), 0.0, jnp.clip(x, -limit, limit))


def bounded(x: Array) -> Array:
    """f32 x: NaN is 0, and all are so small that sums over channels and norms do not overflow."""
    return finite(x, LIMIT / 1024)


def length(x: Array) -> Array:
    """f32 [...]: norms of x [..., H], without squares that overflow or vanish."""
    top = jnp.max(jnp.abs(x), axis=-1)
    safe = jnp.where(top > 0, top, 1.0)
    return top * jnp.sqrt(jnp.sum((x / safe[..., None]) ** 2, axis=-1))


def nearest(x: Array, entries: Array) -> Array:
    """int32 codes of the nearest of some rising entries [n]; of two that are as near, the lower."""
    middle = 0.5 * (entries[1:] + entries[:-1])
    return sum((x > middle[i] for i in range(len(middle))), start=jnp.zeros(x.shape, jnp.int32))


def look_up(codes: Array, entries: Array) -> Array:
    """entries[codes] for a few entries [n], by choices: vector units choose faster than they gather."""
    out = jnp.broadcast_to(entries[0], codes.shape)
    for i in range(1, len(entries)):
        out = jnp.where(codes == i, entries[i], out)
    return out


def whole_bytes(head_dim: int, bits: int) -> None:
    """Raises UsageError unless `head_dim` codes of `bits` bits fill bytes."""
    together = 8 // math.gcd(8, bits)
    if head_dim % together:
        raise UsageError(
            f"codes of {bits} bits fill whole bytes only if head_dim is a multiple of {together}; "
            f"head_dim is {head_dim}. Use more bits."
        )
