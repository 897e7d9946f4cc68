"""What every attention op does with a logit: scale, soft cap, mask, and a softmax that allows empty rows."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def cap(logits: jax.Array, softcap: float | None) -> jax.Array:
    """`softcap * tanh(logits / softcap)` (Gemma 2), or `logits` unchanged when there is no cap."""
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def visible(query_positions: jax.Array, key_positions: jax.Array, window: int | None) -> jax.Array:
    """bool [..., T, S]: key position <= query position, and less than `window` tokens before it."""
    distance = query_positions[..., :, None] - key_positions[..., None, :]
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)


def finite_max(logits: jax.Array) -> jax.Array:
    """Maximum over the last axis, kept as an axis; 0 where everything is -inf, so that `logits - max` is no NaN."""
    top = jnp.max(logits, axis=-1, keepdims=True)
    return jnp.where(jnp.isneginf(top), 0.0, top)


def log_sum(total: jax.Array, top: jax.Array) -> jax.Array:
    """`log(total) + top`, and -inf without a warning in gradients where `total` is 0."""
    empty = total == 0
    return jnp.where(empty, -jnp.inf, jnp.log(jnp.where(empty, 1.0, total)) + top)
