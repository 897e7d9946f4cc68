"""Attention over a cache: the exact merge of attention over its segments and over the new tokens themselves."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from kvjax.cache.prompt import group_filled, group_queries, rotate, ungroup
from kvjax.cache.segment import Segment
from kvjax.cache.step import Step
from kvjax.typing import Array
from pallas_kernels import RotatedLoader, attention_mass, decode_attention, merge, prefill_attention
from pallas_kernels.rope import Rope

if TYPE_CHECKING:
    from kvjax.cache.layer_cache import LayerCache


def read_cache(cache: LayerCache, step: Step) -> tuple[Array, LayerCache, Array | None]:
    """Attends T tokens to the cached ones and, causally, to themselves.

    Returns:
      output [B, T, N, H]; the cache with its statistics updated; the new tokens' own statistics f32 [B, K, T] or None.
    """
    queries, own_keys, ranks = _rotate(cache, step)
    values = step.values.swapaxes(1, 2)
    batch, heads, group, tokens, head_dim = queries.shape
    rows = queries.reshape(batch, heads, group * tokens, head_dim)
    row_positions = jnp.tile(step.positions, (1, group))
    parts, logits = [], []
    for segment, rank in zip(cache.segments, ranks, strict=True):
        keys = segment.key_codec.loader(segment.keys)
        if rank is not None and step.rope is not None:
            keys = RotatedLoader(keys, rank, step.rope)
        read = decode_attention(
            rows,
            keys,
            segment.value_codec.loader(segment.values),
            valid=segment.valid,
            positions=segment.positions if step.window is not None else None,
            query_positions=row_positions if step.window is not None else None,
            window=step.window,
            scale=step.scale,
            softcap=step.softcap,
            return_logits=segment.stats is not None,
        )
        parts.append(read[:2])
        logits.append(read[2] if segment.stats is not None else None)
    own, own_lse = prefill_attention(
        queries, own_keys, values, valid=step.valid, window=step.window, scale=step.scale, softcap=step.softcap
    )
    parts.append((own.reshape(rows.shape).astype(jnp.float32), own_lse.reshape(rows.shape[:-1])))
    merged, lse = merge(parts)
    filled = group_filled(step)
    if not filled.all():  # places without a query head of their own attend to nothing
        lse = jnp.where(jnp.repeat(filled, tokens, axis=1), lse, jnp.inf)
    output = ungroup(step, merged.reshape(queries.shape).astype(step.queries.dtype))
    if not cache.method.keeps_statistics:
        return output, cache, None
    reduce = cache.method.policy.mass_reduce
    assert reduce is not None
    own_mass = attention_mass(
        queries,
        own_keys,
        lse.reshape(queries.shape[:-1]),
        query_positions=step.positions,
        key_positions=step.positions,
        query_valid=step.valid,
        key_valid=step.valid,
        scale=step.scale,
        window=step.window,
        softcap=step.softcap,
        reduce=reduce,
    )
    assert isinstance(own_mass, jax.Array)
    return output, _observe(cache, logits, lse, step.valid, reduce), own_mass


def _observe(cache: LayerCache, logits: list[Array | None], lse: Array, valid: Array, reduce: str) -> LayerCache:
    """Adds the attention that each slot has just received to its statistic."""
    group = lse.shape[-1] // valid.shape[-1]

    def seen(segment: Segment | None, slot_logits: Array | None) -> Segment | None:
        if segment is None or slot_logits is None or segment.stats is None:
            return segment
        finite = jnp.where(lse == -jnp.inf, 0.0, lse)[..., None]
        p = jnp.exp(slot_logits - finite).reshape(*lse.shape[:2], group, valid.shape[-1], -1)
        p = jnp.where(valid[:, None, None, :, None], p, 0.0)
        return dataclasses.replace(segment, stats=segment.stats + getattr(p, reduce)(axis=2).sum(axis=2))

    by_segment = iter(logits)
    fresh = {
        name: seen(segment, next(by_segment))
        for name in ("sinks", "body", "recent")
        if (segment := getattr(cache, name)) is not None
    }
    return dataclasses.replace(cache, **fresh)


def _rotate(cache: LayerCache, step: Step) -> tuple[Array, Array, list[Array | None]]:
    """Rotated queries [B, K, G, T, H], rotated own keys [B, K, T, H], and per segment the ranks to rotate its keys by.

    With original positions the stored keys are already rotated and the ranks are None.
    """
    if cache.method.positions == "original" or step.rope is None:
        keys = rotate(step, step.keys.swapaxes(1, 2))
        return rotate(step, group_queries(step)), keys, [None] * len(cache.segments)
    ranks, total = _ranks(cache.segments)
    own = total[..., None] + jnp.arange(step.positions.shape[1], dtype=jnp.int32)
    rope: Rope = step.rope
    queries = rope.rotate(group_queries(step), own[:, :, None])
    return queries, rope.rotate(step.keys.swapaxes(1, 2), own), list(ranks)


def _ranks(segments: tuple[Segment, ...]) -> tuple[list[Array], Array]:
    """Each cached token's rank by position among its row's (and head's) cached tokens, and their number [B, K or 1]."""
    if not segments:
        return [], jnp.zeros((1, 1), jnp.int32)
    heads = max(s.positions.shape[1] for s in segments)
    everything = jnp.concatenate(
        [jnp.broadcast_to(s.positions, (s.positions.shape[0], heads, s.slots)) for s in segments], axis=-1
    )
    exists = everything >= 0
    order = jnp.argsort(jnp.where(exists, everything, jnp.iinfo(jnp.int32).max), axis=-1)
    rank = jnp.argsort(order, axis=-1).astype(jnp.int32)
    ends = [sum(s.slots for s in segments[: i + 1]) for i in range(len(segments))]
    return jnp.split(rank, ends[:-1], axis=-1), exists.sum(-1, dtype=jnp.int32)
