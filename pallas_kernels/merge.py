"""Exact combination of attention over disjoint sets of keys by their log-sum-exp."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def merge(parts: Sequence[tuple[jax.Array, jax.Array]]) -> tuple[jax.Array, jax.Array]:
    """Attention over the union of the parts' keys.

    Associative and commutative up to rounding. A part without a visible key (lse = -inf) changes nothing, whatever
    finite value its output has; where every part is empty the result is (0, -inf).

    Args:
      parts: at least one pair of an output [..., H] and its log-sum-exp f32 [...], of equal shapes.

    Returns:
      (out f32 [..., H], lse f32 [...]).

    Raises:
      ValueError: `parts` is empty.
    """
    if not parts:
        raise ValueError("merge needs at least one (out, lse) pair")
    if len(parts) == 1:
        out, lse = parts[0]
        return out.astype(jnp.float32), lse
    top = parts[0][1]
    for _, lse in parts[1:]:
        top = jnp.maximum(top, lse)
    top = jnp.where(jnp.isneginf(top), 0.0, top)
    weights = [jnp.exp(lse - top) for _, lse in parts]
    total = sum(weights[1:], start=weights[0])
    mixed = sum(weight[..., None] * out.astype(jnp.float32) for weight, (out, _) in zip(weights, parts, strict=True))
    empty = total == 0
    safe = jnp.where(empty, 1.0, total)
    return mixed / safe[..., None], jnp.where(empty, -jnp.inf, jnp.log(safe) + top)
