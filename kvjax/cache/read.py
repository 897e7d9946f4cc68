"""Attention over a cache: the exact merge of attention over its segments and over the new tokens themselves."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np

from kvjax.cache import hiding
from kvjax.cache.observe import needs_logits, observe
from kvjax.cache.policy import Tokens
from kvjax.cache.pool import Part
from kvjax.cache.prompt import finish, group_filled, rotate, ungroup
from kvjax.cache.read_values import loads_few_values, read_few_values
from kvjax.cache.selector import Chosen
from kvjax.typing import Array
from pallas_kernels import merge, prefill_attention

if TYPE_CHECKING:
    from kvjax.cache.layer_cache import LayerCache


def read_cache(cache: LayerCache, tokens: Tokens) -> tuple[Array, LayerCache, Array | None]:
    """Attends T tokens to the cached ones and, causally, to themselves.

    Returns:
      output [B, T, N, H']; the cache with its statistics updated; the new tokens' own statistics f32 [B, K, T] or None.
    """
    step = tokens.step
    queries, own_keys, ranks = _rotate(cache, tokens)
    lowered = [None if cache.hiding is None else hiding.at(cache.hiding, s.positions) for s in cache.segments]
    if loads_few_values(cache, tokens):
        merged, lse, logits = read_few_values(cache, tokens, queries, own_keys, ranks)
    else:
        chosen, cache = _choose(cache, tokens)
        merged, lse, logits = _read_all_values(cache, tokens, chosen, queries, own_keys, ranks, lowered)
    filled = group_filled(step)
    if not (isinstance(filled, np.ndarray) and filled.all()):  # others' places attend to nothing
        lse = jnp.where(jnp.repeat(filled, queries.shape[3], axis=2), lse, jnp.inf)
    output = ungroup(step, merged.reshape(*queries.shape[:4], -1).astype(step.queries.dtype))
    observed, own_stats = observe(cache, tokens, queries, own_keys, logits, lse.reshape(queries.shape[:-1]))
    if cache.hiding is not None:
        places = [s.positions for s in cache.segments]
        observed = dataclasses.replace(observed, hiding=hiding.after(cache.hiding, step, places, logits))
    return finish(step, output), observed, own_stats


def _read_all_values(
    cache: LayerCache,
    tokens: Tokens,
    chosen: Chosen | None,
    queries: Array,
    own_keys: Array,
    ranks: Sequence[Array | None],
    lowered: Sequence[Array | None],
) -> tuple[Array, Array, list[Array | None]]:
    """The merge over segments and tokens, of which only the chosen pages of the body are read.

    Returns:
      out f32 [B, K, G · T, H'], its log-sum-exp f32 [B, K, G · T], and of each segment the logits that others need.
    """
    step = tokens.step
    batch, heads, group, count, head_dim = queries.shape
    rows = queries.reshape(batch, heads, group * count, head_dim)
    row_positions = jnp.tile(step.positions, (1, group))
    parts, logits = [], []
    for segment, place, less in zip(cache.segments, ranks, lowered, strict=True):
        of_body = chosen if segment is cache.body else None
        wanted = needs_logits(cache, segment) or less is not None
        read = segment.attend(rows, step, place, row_positions, wanted, of_body, less)
        parts.append(read[:2])
        logits.append(read[2] if len(read) > 2 else None)
    own, own_lse = prefill_attention(
        queries, own_keys, tokens.values, valid=step.valid, window=step.window, scale=step.scale, softcap=step.softcap
    )
    parts.append((own.reshape(*rows.shape[:3], -1).astype(jnp.float32), own_lse.reshape(rows.shape[:-1])))
    return *merge(parts), logits


def _choose(cache: LayerCache, tokens: Tokens) -> tuple[Chosen | None, LayerCache]:
    """What the tokens read of the body, where the method selects (None is all); the cache with what the index saw."""
    page = cache.method.selector.page
    if page is None or cache.body is None:
        return None, cache
    valid = cache.body.valid.reshape(*cache.body.valid.shape[:2], -1, page)
    chosen, index = cache.method.selector.choose(cache.index, tokens, valid)
    return chosen, dataclasses.replace(cache, index=index)


def _rotate(cache: LayerCache, tokens: Tokens) -> tuple[Array, Array, list[Array | None]]:
    """Rotated queries [B, K, G, T, H], rotated own keys [B, K, T, H], and per segment the places to rotate its keys by.

    Where the stored keys are already rotated these are None.
    """
    step = tokens.step
    if cache.method.positions == "original" or step.rope is None:
        places = [jnp.maximum(s.positions, 0) if cache.method.stores_unrotated else None for s in cache.segments]
        return tokens.queries, tokens.keys, places
    ranks, total = _ranks(cache.segments)
    own = total[..., None] + jnp.arange(step.positions.shape[1], dtype=jnp.int32)
    queries = rotate(step, tokens.unrotated_queries, own[:, :, None])
    return queries, rotate(step, tokens.unrotated_keys, own), list(ranks)


def _ranks(segments: tuple[Part, ...]) -> tuple[list[Array], Array]:
    """Each cached token's rank by position among its row's (and head's) cached tokens, and their number [B, K or 1]."""
    if not segments:
        return [], jnp.zeros((1, 1), jnp.int32)
    heads = max(s.positions.shape[1] for s in segments)
    everything = jnp.concatenate(
        [jnp.broadcast_to(s.positions, (s.positions.shape[0], heads, s.positions.shape[-1])) for s in segments], axis=-1
    )
    exists = everything >= 0
    order = jnp.argsort(jnp.where(exists, everything, jnp.iinfo(jnp.int32).max), axis=-1)
    rank = jnp.argsort(order, axis=-1).astype(jnp.int32)
    ends = [sum(s.positions.shape[-1] for s in segments[: i + 1]) for i in range(len(segments))]
    return jnp.split(rank, ends[:-1], axis=-1), exists.sum(-1, dtype=jnp.int32)
