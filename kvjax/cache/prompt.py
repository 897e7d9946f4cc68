"""Attention of a prompt to itself, and the grouping of query heads under kv heads that decode shares."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from kvjax.cache.step import Step
from kvjax.typing import Array
from pallas_kernels.logits import cap, visible
from pallas_kernels.prefill_attention import prefill_attention


@functools.cache
def _table(kv_head_of_query: tuple[int, ...], kv_heads: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """int32 [K, G] query head at each place of a kv head's group, and bool [K, G] that is False on padding."""
    groups = [[n for n, k in enumerate(kv_head_of_query) if k == kv] for kv in range(kv_heads)]
    size = max(len(group) for group in groups)
    heads = np.array([group + [0] * (size - len(group)) for group in groups], np.int32)
    filled = np.array([[g < len(group) for g in range(size)] for group in groups])
    return heads, filled


def _uneven(step: Step) -> bool:
    """Whether heads must be gathered: the map is not n // G."""
    n, k = step.queries.shape[2], step.keys.shape[2]
    return step.kv_head_of_query not in (None, tuple(head * k // n for head in range(n)))


def group_filled(step: Step) -> NDArray[np.bool_]:
    """bool [K, G]: False at the places of `group_queries` that hold no query head of their own."""
    n, k = step.queries.shape[2], step.keys.shape[2]
    if not _uneven(step):
        return np.ones((k, n // k), bool)
    return _table(step.kv_head_of_query or (), k)[1]


def group_queries(step: Step) -> Array:
    """The (unrotated) queries [B, T, N, H] under the kv head that each reads: [B, K, G, T, H].

    Groups of unequal size are padded to the largest with copies of query head 0 (`group_filled` tells which).
    """
    b, t, n, h = step.queries.shape
    k = step.keys.shape[2]
    if _uneven(step):
        heads, _ = _table(step.kv_head_of_query or (), k)
        return jnp.moveaxis(step.queries[:, :, heads], 1, 3)
    return jnp.moveaxis(step.queries.reshape(b, t, k, n // k, h), 1, 3)


def ungroup(step: Step, out: Array) -> Array:
    """The inverse of `group_queries`: [B, K, G, T, H] to [B, T, N, H], padded places dropped."""
    b, k, g, t, h = out.shape
    flat = jnp.moveaxis(out, 3, 1).reshape(b, t, k * g, h)
    if not _uneven(step):
        return flat
    heads, filled = _table(step.kv_head_of_query or (), k)
    place = np.zeros(step.queries.shape[2], np.int32)
    place[heads[filled]] = np.flatnonzero(filled)
    return flat[:, :, place]


def rotate(step: Step, grouped: Array) -> Array:
    """Rotates [B, K, ..., T, H] (grouped queries, or keys with the head axis first) by the step's positions."""
    if step.rope is None:
        return grouped
    b, t = step.positions.shape
    return step.rope.rotate(grouped, step.positions.reshape(b, *(1,) * (grouped.ndim - 3), t))


def logits_of(step: Step, queries: Array, keys: Array) -> Array:
    """f32 [..., K, G, T, S], scaled and capped, not masked: rotated queries [..., K, G, T, H], keys [..., K, S, H]."""
    products = jnp.einsum("...kgth,...ksh->...kgts", queries, keys, preferred_element_type=jnp.float32)
    return cap(products * step.scale, step.softcap)


def probabilities(
    step: Step, queries: Array, keys: Array, log_sum_exp: Array, query_positions: Array, key_positions: Array
) -> Array:
    """f32 [..., K, G, T, S]: attention by its log-sum-exp [..., K, G, T]; positions int32 [..., T] and [..., S]."""
    seen = visible(query_positions, key_positions, step.window)[..., None, None, :, :]
    return jnp.where(seen, jnp.exp(logits_of(step, queries, keys) - log_sum_exp[..., None]), 0.0)


def attend_prompt(step: Step) -> tuple[Array, Array]:
    """Exact causal attention of the T tokens of `step` to themselves; differentiable.

    Returns:
      out [B, T, N, H] in the dtype of the queries, and the log-sum-exp f32 [B, K, G, T] in the layout of
      `group_queries`; +inf at padded places, where exp(logit - lse) is then 0.
    """
    out, lse = prefill_attention(
        rotate(step, group_queries(step)),
        rotate(step, jnp.moveaxis(step.keys, 1, 2)),
        jnp.moveaxis(step.values, 1, 2),
        valid=step.valid,
        window=step.window,
        scale=step.scale,
        softcap=step.softcap,
    )
    filled = group_filled(step)
    lse = lse if filled.all() else jnp.where(filled[:, :, None], lse, jnp.inf)
    return ungroup(step, out), lse
