"""Where the tokens of a prompt go: sinks, recent window, and the body for those that win a place."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from kvjax.cache import keys_first
from kvjax.cache.layout import ceil_to, flushed
from kvjax.cache.policy import Prompt
from kvjax.cache.segment import EMPTY, Segment, at_positions, where_true
from kvjax.typing import Array

if TYPE_CHECKING:
    from kvjax.cache.layer_cache import LayerCache


def fill(cache: LayerCache, prompt: Prompt, lengths: Array) -> LayerCache:
    """Distributes the first `lengths` int32 [B] tokens of a prompt over the segments of an empty cache."""
    layout, policy = cache.layout, cache.method.policy
    keys = prompt.stored_keys(cache.method.stores_unrotated)
    stats = policy.prompt_statistics(prompt) if cache.method.keeps_statistics else None

    chosen = lost = jnp.zeros((), bool)
    values, left_ring = prompt.values, flushed(lengths, layout.sinks, cache.ring, layout.block)
    if cache.method.budget.evicts:
        chosen, lost = _chosen(cache, prompt, left_ring)
        values = _merged(cache, prompt, chosen, lost, lengths)

    def put(segment: Segment | None, positions: Array, ahead: Array | None = None) -> Segment | None:
        """positions int32 [B, K or 1, n], EMPTY where a slot stays free; ahead as in `Segment.fill`."""
        if segment is None:
            return None
        slot_stats = None if stats is None else at_positions(stats, positions) * (positions >= 0)
        fitted = segment.fitted(keys, values, prompt)
        stored = at_positions(keys, positions if ahead is None else ahead)
        return fitted.fill(stored, at_positions(values, positions), positions, slot_stats, ahead)

    filled = dataclasses.replace(
        cache,
        sinks=put(cache.sinks, _sink_positions(layout.sinks, lengths)),
        recent=put(cache.recent, _ring_positions(cache, layout.sinks + left_ring, lengths)),
        length=lengths,
        state=policy.next_state(cache.state, _read(prompt, lengths)) if cache.method.budget.evicts else None,
    )
    if cache.method.flush == "keys first":
        positions, ahead = (_in_order(cache, prompt, n) for n in (left_ring, keys_first.coded(filled)))
        filled = _with_body(filled, prompt, put, positions, ahead)
        return keys_first.rounded(filled, keys)
    if not cache.method.budget.evicts:
        return _with_body(filled, prompt, put, _in_order(cache, prompt, left_ring))
    if cache.pool is not None:
        filled = dataclasses.replace(filled, pool=cache.pool.fill(prompt, keys, values, chosen))
    elif cache.body is not None:
        filled = _with_body(filled, prompt, put, where_true(chosen, layout.kept, layout.block))
    if cache.aside is not None:
        aside = cache.method.fate.settle(cache.aside, keys, prompt.values, lost, prompt)
        filled = dataclasses.replace(filled, aside=aside)
    return filled


def _with_body(
    cache: LayerCache,
    prompt: Prompt,
    put: Callable[..., Segment | None],
    positions: Array,
    ahead: Array | None = None,
) -> LayerCache:
    """The cache with tokens at positions int32 [B, K or 1, n] in the body, and the selector's index of them."""
    selector, index = cache.method.selector, cache.index
    if selector.page is not None and positions.shape[-1]:
        places = jnp.pad(positions, ((0, 0), (0, 0), (0, -positions.shape[-1] % selector.page)), constant_values=EMPTY)
        keys = prompt.keys if selector.rotated else prompt.unrotated_keys
        keys = at_positions(keys, places).astype(jnp.float32)
        paged = keys.reshape(*keys.shape[:2], -1, selector.page, keys.shape[-1])
        valid = (places >= 0).reshape(*places.shape[:2], -1, selector.page)
        page = jnp.arange(valid.shape[2], dtype=jnp.int32)[None, None]
        index = selector.indexed(index, paged, valid, page)
    return dataclasses.replace(cache, body=put(cache.body, positions, ahead), index=index)


def _read(prompt: Prompt, lengths: Array) -> Prompt:
    """The prompt without the tokens that the cache will see as the next steps."""
    valid = prompt.valid & (prompt.positions < lengths[:, None])
    return dataclasses.replace(prompt, step=dataclasses.replace(prompt.step, valid=valid))


def _sink_positions(sinks: int, lengths: Array) -> Array:
    p = jnp.arange(sinks, dtype=jnp.int32)
    return jnp.where(p < lengths[:, None], p, EMPTY)[:, None]


def _ring_positions(cache: LayerCache, first: Array, lengths: Array) -> Array:
    layout, ring = cache.layout, cache.ring[:, None]
    slot = jnp.arange(layout.ring, dtype=jnp.int32)
    p = first[:, None] + (slot - (first[:, None] - layout.sinks)) % jnp.maximum(ring, 1)
    return jnp.where((p < lengths[:, None]) & (slot < ring), p, EMPTY)[:, None]


def _in_order(cache: LayerCache, prompt: Prompt, number: Array) -> Array:
    """Positions of a body that keeps everything, of which `number` int32 [B] tokens are there."""
    layout, block = cache.layout, math.lcm(*(codec.block for codec in cache.method.codecs))
    rank = jnp.arange(min(layout.body, ceil_to(prompt.valid.shape[1], block)), dtype=jnp.int32)
    return jnp.where(rank < number[:, None], layout.sinks + rank, EMPTY)[:, None]


def _chosen(cache: LayerCache, prompt: Prompt, left_ring: Array) -> tuple[Array, Array]:
    """bool [B, K or 1, T]: of the tokens that have left the ring, those that get a place in the body and the others."""
    layout, p = cache.layout, prompt.positions[:, None]
    eligible = (p >= layout.sinks) & (p < layout.sinks + left_ring[:, None, None])
    chosen = _winners(cache, prompt, eligible, left_ring)
    return chosen, eligible & ~chosen


def _merged(cache: LayerCache, prompt: Prompt, chosen: Array, lost: Array, lengths: Array) -> Array:
    """The values [B, K, T, H] of a prompt's tokens after those of the losers have gone where their fate says."""
    layout, method = cache.layout, cache.method
    if not method.fate.merges:
        return prompt.values
    p, tokens = prompt.positions[:, None], prompt.valid.shape[1]
    kept = (p >= layout.sinks) & (p < lengths[:, None, None]) & ~lost
    mass = prompt.mass("sum") if method.policy.mass_reduce is None else method.policy.prompt_statistics(prompt)
    most = tokens if method.budget.pooled else min(tokens, layout.kept + layout.ring)
    return method.fate.carried(kept, lost, mass, most, prompt)


def _winners(cache: LayerCache, prompt: Prompt, eligible: Array, left_ring: Array) -> Array:
    """bool [B, K or 1, T]: the tokens that get a place in the body, among those that are eligible."""
    layout, method = cache.layout, cache.method
    kept = min(layout.kept, prompt.valid.shape[1] // layout.block * layout.block)
    if kept == 0:
        return jnp.zeros_like(eligible)
    shown = dataclasses.replace(prompt, competing=eligible, places=cache.limit)
    take = jnp.minimum(cache.limit, left_ring)[:, None, None]
    scores = method.fate.rescore(method.policy.prompt_scores(shown), eligible, take, shown)
    scores = jnp.where(eligible, scores, -jnp.inf)
    if not method.budget.pooled:
        return _best(scores, take, kept)
    heads = cache.head_index.shape[0]
    least = jnp.floor(take * method.budget.least_share + 1e-4).astype(jnp.int32)
    scores = jnp.where(_best(scores, least, kept), jnp.inf, scores)
    together = _best(scores.reshape(len(scores), 1, -1), take * heads, kept * heads)
    return together.reshape(scores.shape)


def _best(scores: Array, take: Array, most: int) -> Array:
    """bool [B, K, T]: the `take` [B, 1, 1] largest of each head that are not -inf, at most `most`; ties by position."""
    score, index = jax.lax.top_k(scores, most)
    wanted = (jnp.arange(most) < take) & (score > -jnp.inf)
    b, k = jnp.arange(scores.shape[0])[:, None, None], jnp.arange(scores.shape[1])[None, :, None]
    return jnp.zeros(scores.shape, bool).at[b, k, index].set(wanted)
