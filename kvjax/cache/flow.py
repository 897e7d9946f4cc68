"""The flow of new tokens between segments: ring first, then competition for the body by the policy's score."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from kvjax.cache import keys_first
from kvjax.cache.compete import Arriving, compete
from kvjax.cache.method import CacheMethod
from kvjax.cache.policy import Tokens
from kvjax.cache.segment import EMPTY
from kvjax.typing import Array

if TYPE_CHECKING:
    from kvjax.cache.layer_cache import LayerCache


def append(cache: LayerCache, tokens: Tokens, stats: Array | None, after: Array) -> LayerCache:
    """Appends T tokens (those that are valid) in order; stats f32 [B, K, T] or None.

    What is written is made to depend on `after`, the attention output. Without that nothing orders the reads of a
    donated cache before its writes, and XLA copies every store in each step.
    """
    step = tokens.step
    keys = tokens.stored_keys(cache.method.stores_unrotated).swapaxes(1, 2)
    if cache.method.budget.evicts:
        cache = dataclasses.replace(cache, state=cache.method.policy.next_state(cache.state, tokens))
    leaves = (keys, step.values, None if stats is None else stats.swapaxes(1, 2), step.valid)
    total = jnp.sum(after.astype(jnp.float32))
    ordered = functools.partial(jnp.where, jnp.isnan(total) & jnp.isinf(total), 0.0)  # never true; XLA cannot know
    seen = cache.length + step.valid.sum(-1, dtype=jnp.int32)
    if step.valid.shape[1] == 1:
        return _append_one(cache, tokens, ordered, seen, *jax.tree.map(lambda x: x[:, 0], leaves))
    by_token = jax.tree.map(lambda x: x.swapaxes(0, 1), leaves)
    cache, _ = jax.lax.scan(lambda c, t: (_append_one(c, tokens, ordered, seen, *t), None), cache, by_token)
    return cache


def _append_one(
    cache: LayerCache,
    tokens: Tokens,
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
        cache = _insert(cache, tokens, seen, Arriving(*token, past_sinks[:, None]))
    else:
        slot = (position - layout.sinks) % cache.ring
        beyond = position - layout.sinks - cache.ring
        leaves = past_sinks & (beyond >= 0) & (beyond % layout.block == 0)
        if cache.body is not None or cache.aside is not None:
            keys, values, positions, stats = ring.read(slot, layout.block)
            block = Arriving(ordered(keys), ordered(values), positions, stats, leaves[:, None])
            cache = _insert(cache, tokens, seen, block)
            ring = cache.recent or ring
        left = jnp.where(leaves, slot // layout.block, layout.ring)[:, None]
        entered = jnp.where(past_sinks, slot, layout.ring)[:, None]
        recent = ring.clear(left, layout.block).write(*token, entered, 1)
        cache = dataclasses.replace(cache, recent=recent)
    cache = dataclasses.replace(cache, length=cache.length + valid.astype(jnp.int32))
    return keys_first.flush(cache, past_sinks) if cache.method.flush == "keys first" else cache


def _insert(cache: LayerCache, tokens: Tokens, seen: Array, new: Arriving) -> LayerCache:
    """A block enters the body where it is present, over a free place or the place of a loser."""
    body, block, method = cache.body, cache.layout.block, cache.method
    if body is None:
        if cache.aside is None:
            return cache  # the room is no larger than the sinks
        aside = method.fate.receive(cache.aside, new.keys, new.values, new.positions, new.present)
        return dataclasses.replace(cache, aside=aside)
    if not method.budget.evicts:
        target, write = (new.positions[:, :, 0] - cache.layout.sinks) // block, new.present
    else:
        used = body.positions[..., ::block] >= 0
        write = jnp.broadcast_to(new.present, used.shape[:2])
        if cache.phase == "prompt" or method.every is not None:
            new = dataclasses.replace(new, present=write)
            used, write, cache, new = compete(cache, tokens, seen, used, new)
            assert cache.body is not None
            keep = jnp.repeat(used, block, axis=-1)
            body = dataclasses.replace(cache.body, positions=jnp.where(keep, body.positions, EMPTY))
        target = jnp.argmin(used, axis=-1).astype(jnp.int32)
    target = jnp.where(write, target, body.slots // block)
    page, index = method.selector.page, cache.index
    if page is not None:
        there = jnp.ones((*target.shape, 1, block), bool)
        compared = _as_compared(method, tokens, new)
        index = method.selector.indexed(index, compared[:, :, None], there, (target * block // page)[..., None])
    keys = None if method.flush == "keys first" else new.keys
    body = body.write(keys, new.values, new.positions, new.stats, target, block)
    return dataclasses.replace(cache, index=index, body=body)


def _as_compared(method: CacheMethod, tokens: Tokens, new: Arriving) -> Array:
    """The keys of a block, f32 [B, K, block, H], in the form that the selector's index is made of."""
    keys, rope, rotated = new.keys.astype(jnp.float32), tokens.step.rope, method.selector.rotated
    if rope is None or rotated != method.stores_unrotated:
        return keys
    turned = rope.rotate(keys, new.positions if rotated else -new.positions)
    return turned if rotated else turned / rope.amplitude**2
