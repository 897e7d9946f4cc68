"""The flow of tokens between segments: ring first, then competition for the body by the policy's score."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from kvjax.cache.layout import ceil_to, flushed
from kvjax.cache.policy import Prompt, Slots
from kvjax.cache.prompt import rotate
from kvjax.cache.segment import EMPTY, Segment
from kvjax.cache.step import Step
from kvjax.typing import Array

if TYPE_CHECKING:
    from kvjax.cache.layer_cache import LayerCache


def fill(cache: LayerCache, prompt: Prompt, keys: Array, lengths: Array) -> LayerCache:
    """Distributes the first `lengths` tokens of a prompt over the segments of an empty cache.

    keys [B, K, T, H] as they are to be stored; lengths int32 [B].
    """
    layout = cache.layout
    stats = None
    if cache.method.keeps_statistics:
        assert cache.method.policy.mass_reduce is not None
        stats = prompt.mass(cache.method.policy.mass_reduce)

    def put(segment: Segment | None, positions: Array) -> Segment | None:
        """positions int32 [B, K or 1, n], EMPTY where a slot stays free."""
        if segment is None:
            return None
        index = jnp.maximum(positions, 0)
        chosen_keys, chosen_values = (jnp.take_along_axis(x, index[..., None], axis=2) for x in (keys, prompt.values))
        slot_stats = None if stats is None else jnp.take_along_axis(stats, index, axis=2) * (positions >= 0)
        return segment.fill(chosen_keys, chosen_values, positions, slot_stats)

    left_ring = flushed(lengths, layout.sinks, cache.ring, layout.block)
    return dataclasses.replace(
        cache,
        sinks=put(cache.sinks, _sink_positions(layout.sinks, lengths)),
        recent=put(cache.recent, _ring_positions(cache, layout.sinks + left_ring, lengths)),
        body=put(cache.body, _body_positions(cache, prompt, left_ring)),
        length=lengths,
    )


def _sink_positions(sinks: int, lengths: Array) -> Array:
    p = jnp.arange(sinks, dtype=jnp.int32)
    return jnp.where(p < lengths[:, None], p, EMPTY)[:, None]


def _ring_positions(cache: LayerCache, first: Array, lengths: Array) -> Array:
    layout, ring = cache.layout, cache.ring[:, None]
    slot = jnp.arange(layout.ring, dtype=jnp.int32)
    p = first[:, None] + (slot - (first[:, None] - layout.sinks)) % jnp.maximum(ring, 1)
    return jnp.where((p < lengths[:, None]) & (slot < ring), p, EMPTY)[:, None]


def _body_positions(cache: LayerCache, prompt: Prompt, left_ring: Array) -> Array:
    """Positions for the body's first slots, in rising order: the policy's choice among tokens that left the ring."""
    layout, sinks, tokens = cache.layout, cache.layout.sinks, prompt.valid.shape[1]
    if not cache.method.budget.evicts:
        rank = jnp.arange(min(layout.body, ceil_to(tokens, layout.block)), dtype=jnp.int32)
        return jnp.where(rank < left_ring[:, None], sinks + rank, EMPTY)[:, None]
    scores = cache.method.policy.prompt_scores(prompt)
    p = prompt.positions[:, None]
    eligible = (p >= sinks) & (p < sinks + left_ring[:, None, None])
    kept = min(layout.kept, tokens // layout.block * layout.block)
    score, chosen = jax.lax.top_k(jnp.where(eligible, scores, -jnp.inf), kept)
    take = jnp.minimum(cache.limit, left_ring)[:, None, None]
    wanted = (jnp.arange(kept) < take) & (score > -jnp.inf)
    ordered = jnp.sort(jnp.where(wanted, chosen, tokens), axis=-1)
    return jnp.where(ordered < tokens, ordered, EMPTY).astype(jnp.int32)


def append(cache: LayerCache, step: Step, stats: Array | None, after: Array) -> LayerCache:
    """Appends T tokens (those that are valid) in order; stats f32 [B, K, T] or None.

    What is written is made to depend on `after`, the attention output. Without that nothing orders the reads of a
    donated cache before its writes, and XLA copies every store in each step.
    """
    keys = step.keys.swapaxes(1, 2)
    if cache.method.positions == "original":
        keys = rotate(step, keys)
    tokens = (keys.swapaxes(1, 2), step.values, None if stats is None else stats.swapaxes(1, 2), step.valid)
    total = jnp.sum(after.astype(jnp.float32))
    ordered = functools.partial(jnp.where, jnp.isnan(total) & jnp.isinf(total), 0.0)  # never true; XLA cannot know
    seen = cache.length + step.valid.sum(-1, dtype=jnp.int32)
    if step.valid.shape[1] == 1:
        return _append_one(cache, ordered, seen, *jax.tree.map(lambda x: x[:, 0], tokens))
    by_token = jax.tree.map(lambda x: x.swapaxes(0, 1), tokens)
    cache, _ = jax.lax.scan(lambda c, t: (_append_one(c, ordered, seen, *t), None), cache, by_token)
    return cache


def _append_one(
    cache: LayerCache,
    ordered: Callable[[Array], Array],
    seen: Array,
    key: Array,
    value: Array,
    stat: Array | None,
    valid: Array,
) -> LayerCache:
    """key, value [B, K, H]; stat f32 [B, K]; valid bool [B]; seen as in `Slots`."""
    layout, position = cache.layout, cache.length
    token = (
        ordered(key[:, :, None]),
        ordered(value[:, :, None]),
        position[:, None, None],
        None if stat is None else stat[..., None],
    )
    past_sinks = valid & (position >= layout.sinks)
    if cache.sinks is not None:
        slot = jnp.where(valid & ~past_sinks, position, layout.sinks)
        cache = dataclasses.replace(cache, sinks=cache.sinks.write(*token, slot[:, None], 1))
    ring = cache.recent
    if ring is None:
        cache = _insert(cache, seen, *token, past_sinks)
    else:
        slot = (position - layout.sinks) % cache.ring
        beyond = position - layout.sinks - cache.ring
        leaves = past_sinks & (beyond >= 0) & (beyond % layout.block == 0)
        if cache.body is not None:
            keys, values, positions, stats = ring.read(slot, layout.block)
            cache = _insert(cache, seen, ordered(keys), ordered(values), positions, stats, leaves)
        left = jnp.where(leaves, slot // layout.block, layout.ring)[:, None]
        entered = jnp.where(past_sinks, slot, layout.ring)[:, None]
        recent = ring.clear(left, layout.block).write(*token, entered, 1)
        cache = dataclasses.replace(cache, recent=recent)
    return dataclasses.replace(cache, length=cache.length + valid.astype(jnp.int32))


def _insert(
    cache: LayerCache, seen: Array, keys: Array, values: Array, positions: Array, stats: Array | None, present: Array
) -> LayerCache:
    """A block enters the body where it is present (bool [B]), over a free place or the place of a loser."""
    body, block = cache.body, cache.layout.block
    assert body is not None
    if not cache.method.budget.evicts:
        target = (positions[:, :, 0] - cache.layout.sinks) // block
        write = present[:, None]
    else:
        used = body.positions[..., ::block] >= 0
        competing = cache.phase == "prompt" or cache.method.every is not None
        write = jnp.broadcast_to(present[:, None], used.shape[:2])
        if competing:
            used, write = _compete(cache, seen, used, positions, stats, write)
            keep = jnp.repeat(used, block, axis=-1)
            body = dataclasses.replace(body, positions=jnp.where(keep, body.positions, EMPTY))
        target = jnp.argmin(used, axis=-1).astype(jnp.int32)
    target = jnp.where(write, target, body.slots // block)
    return dataclasses.replace(cache, body=body.write(keys, values, positions, stats, target, block))


def _compete(
    cache: LayerCache, seen: Array, used: Array, positions: Array, stats: Array | None, present: Array
) -> tuple[Array, Array]:
    """Frees the blocks with the lowest scores where the body is at its limit.

    Args:
      used: bool [B, K or 1, M], blocks that hold tokens. present: bool [B, K or 1], whether a block arrives.

    Returns:
      The blocks that stay, and whether the arriving block does.
    """
    body, policy, block = cache.body, cache.method.policy, cache.layout.block
    assert body is not None
    batch, heads, blocks = used.shape

    def block_scores(positions: Array, stats: Array | None) -> Array:
        slots = Slots(positions=positions, stats=stats, seen=seen, head_index=cache.head_index)
        scores = policy.slot_scores(slots)
        return scores.reshape(*scores.shape[:2], -1, block).mean(-1)

    old = jnp.where(used, block_scores(body.positions, body.stats), jnp.inf)
    arriving = jnp.broadcast_to(block_scores(positions, stats), (batch, heads, 1))
    losers = 1 if cache.method.every is None else cache.method.every // block
    room = cache.limit // block + losers - 1
    full = present & (used.sum(-1) >= room[:, None])
    _, lowest = jax.lax.top_k(-jnp.concatenate([old, arriving], axis=-1), min(losers, blocks + 1))
    lost = jax.nn.one_hot(lowest, blocks + 1, dtype=jnp.bool_).any(axis=-2) & full[..., None]
    return used & ~lost[..., :blocks], present & ~lost[..., blocks]
