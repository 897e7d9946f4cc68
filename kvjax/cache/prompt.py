"""Attention of a prompt to itself, and the grouping of query heads under kv heads that decode shares."""

from __future__ import annotations

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from kvjax.cache.step import Step
from kvjax.errors import UsageError
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


def group_filled(step: Step) -> NDArray[np.bool_] | Array:
    """bool [1 or B, K, G]: False at the places of `group_queries` that hold no query head of their own.

    A NumPy array, so that its values are known while tracing, unless the head map is data.
    """
    n, k = step.queries.shape[2], step.keys.shape[2]
    if step.head_map is not None:
        return step.head_map[:, None] == jnp.arange(k)[:, None]
    if not _uneven(step):
        return np.ones((1, k, n // k), bool)
    return _table(step.kv_head_of_query or (), k)[1][None]


def group(step: Step, x: Array) -> Array:
    """What belongs to query heads, [B, T, N, H], under the kv head that each reads: [B, K, G, T, H].

    Groups of unequal size are padded to the largest with copies of query head 0 (`group_filled` tells which). Where the
    head map is data, every group holds all heads.
    """
    b, t, n, h = x.shape
    k = step.keys.shape[2]
    if step.head_map is not None:
        return jnp.broadcast_to(jnp.moveaxis(x, 1, 2)[:, None], (b, k, n, t, h))
    if _uneven(step):
        heads, _ = _table(step.kv_head_of_query or (), k)
        return jnp.moveaxis(x[:, :, heads], 1, 3)
    return jnp.moveaxis(x.reshape(b, t, k, n // k, h), 1, 3)


def group_queries(step: Step) -> Array:
    """The (unrotated) queries under the kv head that each reads, `group`ed, as they meet the keys of `all_keys`."""
    if step.latent is None:
        return group(step, step.queries)
    absorbed = jnp.einsum("btnc,nrc->btnr", step.latent.queries, step.latent.up_keys)
    return group(step, jnp.concatenate([absorbed.astype(step.queries.dtype), step.queries], axis=-1))


def all_keys(step: Step) -> Array:
    """The (unrotated) keys as queries meet them, [B, K, T, H]: behind the latent, where there is one."""
    keys = step.keys if step.latent is None else jnp.concatenate([step.values, step.keys], axis=-1)
    return keys.swapaxes(1, 2)


def ungroup(step: Step, out: Array) -> Array:
    """The inverse of `group`: [B, K, G, T, H] to [B, T, N, H], padded places dropped."""
    b, k, g, t, h = out.shape
    if step.head_map is not None:
        mine = jnp.take_along_axis(out, step.head_map[:, None, :, None, None], axis=1)
        return jnp.moveaxis(mine[:, 0], 2, 1)
    flat = jnp.moveaxis(out, 3, 1).reshape(b, t, k * g, h)
    if not _uneven(step):
        return flat
    heads, filled = _table(step.kv_head_of_query or (), k)
    place = np.zeros(step.queries.shape[2], np.int32)
    place[heads[filled]] = np.flatnonzero(filled)
    return flat[:, :, place]


def finish(step: Step, out: Array) -> Array:
    """What attention returns, [B, T, N, H'], of cached values that query heads have read, [B, T, N, ...]."""
    if step.latent is not None:
        return jnp.einsum("btnr,nrh->btnh", out, step.latent.up_values.astype(out.dtype))
    if step.value_part is None:
        return out
    parts = out.reshape(*out.shape[:3], max(step.value_part) + 1, -1)
    return jnp.take_along_axis(parts, np.array(step.value_part)[None, None, :, None, None], axis=3)[..., 0, :]


def rotate(step: Step, x: Array, positions: Array | None = None) -> Array:
    """Rotates [B, K, ..., T, H] (grouped queries, or keys with the head axis first).

    positions: int32, broadcasts to x.shape[:-1]; None takes those of the step.
    """
    if step.rope is None:
        return x
    if positions is None:
        b, t = step.positions.shape
        positions = step.positions.reshape(b, *(1,) * (x.ndim - 3), t)
    width = step.keys.shape[-1] if step.rotary_dim is None else step.rotary_dim
    if width == x.shape[-1]:
        return step.rope.rotate(x, positions)
    fixed, turned = jnp.split(x, [x.shape[-1] - width], axis=-1)
    return jnp.concatenate([fixed, step.rope.rotate(turned, positions)], axis=-1)


def logits_of(step: Step, queries: Array, keys: Array) -> Array:
    """f32 [..., K, G, T, S], scaled and capped, not masked: rotated queries [..., K, G, T, H], keys [..., K, S, H]."""
    products = jnp.einsum("...kgth,...ksh->...kgts", queries, keys, preferred_element_type=jnp.float32)
    return cap(products * step.scale, step.softcap)


def probabilities(
    step: Step, queries: Array, keys: Array, log_sum_exp: Array, query_positions: Array, key_positions: Array
) -> Array:
    """f32 [..., K, G, T, S]: attention by its log-sum-exp [..., K, G, T]; positions int32 [..., T] and [..., S].

    Raises:
      UsageError: see `check_whole`.
    """
    check_whole(step)
    seen = visible(query_positions, key_positions, step.window)[..., None, None, :, :]
    return jnp.where(seen, jnp.exp(logits_of(step, queries, keys) - log_sum_exp[..., None]), 0.0)


def check_whole(step: Step) -> None:
    """Raises UsageError where the attention that a prompt's tokens pay does not follow from their log-sum-exp alone."""
    if step.selective:
        raise UsageError(
            "the attention that a prompt's tokens receive is wanted, but selective attention lowers their logits, "
            "which this sum leaves out. Use the policy Hidden, one that looks at no attention, or prefill='streaming'."
        )


def allocated(step: Step) -> Step:
    """The step with the head map that its rule gives, where it has a rule and no map yet."""
    if step.allocation is None or step.head_map is not None:
        return step
    return dataclasses.replace(step, head_map=step.allocation.head_of_query(step))


def attend_prompt(step: Step) -> tuple[Array, Array]:
    """Exact causal attention of the T tokens of `step` to themselves; differentiable.

    Returns:
      out [B, T, N, H'] in the dtype of the queries, and the log-sum-exp f32 [B, K, G, T] in the layout of
      `group_queries`; +inf at padded places, where exp(logit - lse) is then 0.
    """
    step = allocated(step)
    wide = widened(step)
    queries, keys = rotate(wide, group_queries(wide)), rotate(wide, all_keys(wide))
    out, lse, *_ = prefill_attention(
        queries,
        keys,
        jnp.moveaxis(wide.values, 1, 2),
        valid=step.valid,
        window=step.window,
        scale=step.scale,
        softcap=step.softcap,
        selection=selection(step) if step.selective else None,
    )
    if wide is not step:
        lse = group(step, ungroup(wide, lse[..., None]))[..., 0]
    filled = group_filled(step)
    if not (isinstance(filled, np.ndarray) and filled.all()):
        lse = jnp.where(filled[..., None], lse, jnp.inf)
    return ungroup(wide, out), lse


def widened(step: Step) -> Step:
    """The same attention with keys and values of a plain kind, more of them: no waste where there are many queries."""
    if step.latent is not None:
        return _with_own_keys(step)
    b, t, k, _ = step.keys.shape
    if step.head_map is not None:
        at = step.head_map[:, None, :, None]
        keys, values = (jnp.take_along_axis(x, at, axis=2) for x in (step.keys, step.values))
        return dataclasses.replace(step, keys=keys, values=values, head_map=None, kv_head_of_query=None)
    if step.value_part is None:
        return step
    n, parts = step.queries.shape[2], max(step.value_part) + 1
    reads = step.kv_head_of_query or tuple(head * k // n for head in range(n))
    return dataclasses.replace(
        step,
        keys=jnp.repeat(step.keys, parts, axis=2),
        values=step.values.reshape(b, t, k * parts, -1),
        kv_head_of_query=tuple(head * parts + part for head, part in zip(reads, step.value_part, strict=True)),
        value_part=None,
    )


def _with_own_keys(step: Step) -> Step:
    """Latents made into a key and a value for each query head."""
    latent = step.latent
    assert latent is not None
    values, dtype = step.values[:, :, 0], step.queries.dtype
    keys = jnp.einsum("btr,nrc->btnc", values, latent.up_keys).astype(dtype)
    turned = jnp.broadcast_to(step.keys, (*keys.shape[:3], step.keys.shape[-1]))
    return dataclasses.replace(
        step,
        queries=jnp.concatenate([latent.queries, step.queries], axis=-1),
        keys=jnp.concatenate([keys, turned], axis=-1),
        values=jnp.einsum("btr,nrc->btnc", values, latent.up_values).astype(dtype),
        latent=None,
        rotary_dim=step.keys.shape[-1],
    )


def hiding_head(step: Step) -> int:
    """The kv head that query head 0 reads, whose logits say what is hidden.

    Raises:
      UsageError: these logits are not plain products of the step's queries and keys.
    """
    if step.softcap is not None or step.latent is not None or step.head_map is not None or step.allocation is not None:
        raise UsageError(
            "selective attention takes its selections from the logits of query head 0 and of the kv head that it is "
            "known to read; it goes neither with capped logits (softcap), nor with latents, nor with a map of heads "
            "that is data. Leave out the one or the other."
        )
    return 0 if step.kv_head_of_query is None else step.kv_head_of_query[0]


def selection(step: Step) -> tuple[Array, Array]:
    """By which tokens hide others: rotated queries and keys of head 0, [B, 1, T, H]; a row's first token is safe."""
    head = hiding_head(step)
    queries = rotate(step, jnp.moveaxis(step.queries[:, :, :1], 1, 2))
    keys = rotate(step, jnp.moveaxis(step.keys[:, :, head : head + 1], 1, 2))
    return queries, jnp.where((step.positions == 0)[:, None, :, None], 0, keys)
