"""Competition for the body after the prompt: who loses a place, and what becomes of the loser."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from kvjax.cache import hiding
from kvjax.cache.fate import Kept, Lost
from kvjax.cache.policy import Slots, Tokens
from kvjax.cache.segment import EMPTY, Segment
from kvjax.typing import Array, PyTree

if TYPE_CHECKING:
    from kvjax.cache.layer_cache import LayerCache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Arriving:
    """A block that has left the recent window.

    Attributes:
      keys, values: [B, K, block, H], as they are to be stored. positions: int32 [B, 1, block].
      stats: f32 [B, K, block] or None. present: bool [B, K or 1], where there is such a block.
    """

    keys: Array
    values: Array
    positions: Array
    stats: Array | None
    present: Array


def compete(
    cache: LayerCache, tokens: Tokens, seen: Array, used: Array, new: Arriving
) -> tuple[Array, Array, LayerCache, Arriving]:
    """Frees the blocks with the lowest scores where the body is at its limit.

    Args:
      seen: as in `Slots`. used: bool [B, K or 1, M], blocks that hold tokens.

    Returns:
      The blocks that stay; whether the arriving block does; the cache whose fate has met the losers; and the arriving
      block, made to depend on the losers, which are read before it is written over one of them.
    """
    block, blocks = cache.layout.block, used.shape[-1]
    number = 1 if cache.method.every is None else cache.method.every // block
    room = cache.limit // block + number - 1
    full = new.present & (used.sum(-1) >= room[:, None])

    def rank() -> Array:
        return jax.lax.top_k(-_block_scores(cache, tokens, seen, used, new), min(number, blocks + 1))[1]

    if number == 1:
        lowest = rank()
    else:  # scores are needed at every `number`-th block only
        # Made of `used`, so that inside `shard_map` both branches vary over the mesh alike.
        none = jnp.repeat(used[..., :1].astype(jnp.int32) * 0, min(number, blocks + 1), axis=-1)
        lowest = jax.lax.cond(full.any(), rank, lambda: none)
    lost = jax.nn.one_hot(lowest, blocks + 1, dtype=jnp.bool_).any(axis=-2) & full[..., None]
    stay, enters = used & ~lost[..., :blocks], new.present & ~lost[..., blocks]
    if cache.method.fate.merges:
        cache, new = _bequeath(cache, lowest, full, stay, enters, new)
    aside, new = _surrender(cache, lowest, full, new)
    return stay, enters, dataclasses.replace(cache, aside=aside), new


def _block_scores(cache: LayerCache, tokens: Tokens, seen: Array, used: Array, new: Arriving) -> Array:
    """f32 [B, K or 1, M + 1]: mean scores of the body's blocks, +inf where empty, and of the arriving one."""
    heads, method = cache.head_index.shape[0], cache.method
    given = _Given(cache.body, new, cache.state, cache.data)
    if method.policy.scope == "head" and method.policy.per_head and not method.joint and heads > 1:

        def of_head(index: Array) -> Array:
            def take(leaf: Array) -> Array:
                if leaf.ndim < 2 or leaf.shape[1] == 1:
                    return leaf
                # A CPU computes on 16-bit numbers as float32: of them it would first convert the whole store.
                bits = leaf.view(jnp.uint16) if leaf.dtype in (jnp.bfloat16, jnp.float16) else leaf
                return jax.lax.dynamic_slice_in_dim(bits, index, 1, axis=1).view(leaf.dtype)

            one = jax.lax.dynamic_slice_in_dim(cache.head_index, index, 1)
            return _scores(jax.tree.map(take, given), one, cache, tokens, seen)[:, 0]

        # A head at a time: what is decoded to be looked at is never the whole store.
        scores = jnp.moveaxis(jax.lax.map(of_head, jnp.arange(heads)), 0, 1)
    else:
        scores = _scores(given, cache.head_index, cache, tokens, seen)
    scores = scores.reshape(*scores.shape[:2], -1, cache.layout.block).mean(-1)
    there = jnp.concatenate([used, jnp.ones((*used.shape[:2], 1), bool)], axis=-1)
    return jnp.where(there, scores, jnp.inf)


class _Given(NamedTuple):
    """What scores are made of; leaves [B or 1, K or 1, ...]."""

    body: Segment | None
    new: Arriving
    state: PyTree
    data: PyTree


def _scores(given: _Given, head_index: Array, cache: LayerCache, tokens: Tokens, seen: Array) -> Array:
    """f32 [B, K or 1, S + block]: the policy's, of the body's slots and of the arriving block; of the heads given."""
    body, new = given.body, given.new
    assert body is not None
    positions = jnp.broadcast_to(new.positions, (*body.positions.shape[:2], cache.layout.block))
    positions = jnp.concatenate([body.positions, positions], axis=-1)
    keys = jnp.concatenate([body.decoded_keys, new.keys.astype(jnp.float32)], axis=2)
    if cache.method.stores_unrotated and tokens.step.rope is not None:
        keys = tokens.step.rope.rotate(keys, jnp.maximum(positions, 0))
    values = jnp.concatenate([body.decoded_values, new.values.astype(jnp.float32)], axis=2)
    slots = Slots(
        positions=positions,
        stats=None if body.stats is None or new.stats is None else jnp.concatenate([body.stats, new.stats], axis=-1),
        seen=seen,
        head_index=head_index,
        keys=keys if not cache.dims.latent else jnp.concatenate([values, keys], axis=-1),
        values=values,
        state=given.state,
        data=given.data,
        hiding=None if cache.hiding is None else hiding.at(cache.hiding, positions),
    )
    return cache.method.policy.slot_scores(slots)


def _surrender(cache: LayerCache, lowest: Array, full: Array, new: Arriving) -> tuple[Segment | None, Arriving]:
    """Hands the losers, blocks `lowest` int32 [B, K or 1, n] where `full`, to the fate."""
    body, block, aside = cache.body, cache.layout.block, cache.aside
    if aside is None or body is None:
        return aside, new
    last = body.slots // block

    def one(index: Array, aside: Segment) -> tuple[Segment, Array]:
        keys, values, positions = body.block_at(jnp.minimum(index, last - 1), block)
        itself = (index == last)[..., None]
        keys = jnp.where(itself[..., None], new.keys, keys)
        values = jnp.where(itself[..., None], new.values, values)
        positions = jnp.where(itself, new.positions, positions)
        return cache.method.fate.receive(aside, keys, values, positions, full), jnp.sum(keys) + jnp.sum(values)

    if lowest.shape[-1] == 1:
        aside, read = one(lowest[..., 0], aside)
    else:
        read = jnp.float32(0)
        for i in range(lowest.shape[-1]):
            aside, part = one(lowest[..., i], aside)
            read = read + part
    # Nothing else orders the reads of a donated store before the write: XLA would copy the store.
    never = jnp.isnan(read) & jnp.isinf(read)
    keys, values = (jnp.where(never, 0.0, x).astype(x.dtype) for x in (new.keys, new.values))
    return aside, dataclasses.replace(new, keys=keys, values=values)


def _bequeath(
    cache: LayerCache, lowest: Array, full: Array, stay: Array, enters: Array, new: Arriving
) -> tuple[LayerCache, Arriving]:
    """Hands the values of the losers, tokens `lowest` int32 [B, K or 1, n] where `full`, to those that stay."""
    body, ring = cache.body, cache.recent
    assert body is not None and body.stats is not None and new.stats is not None
    heads, last = body.stats.shape[1], body.slots
    ours = jnp.broadcast_to(new.positions, (*enters.shape, 1))
    entering = Kept(new.values, jnp.where(enters[..., None], ours, EMPTY), new.stats)
    parts = [Kept(body.values, jnp.where(stay, body.positions, EMPTY), body.stats), entering]
    if ring is not None and ring.stats is not None:
        leaves = new.present[..., None] & (ring.positions == new.positions)
        parts.append(Kept(ring.values, jnp.where(leaves, EMPTY, ring.positions), ring.stats))
    total = jnp.sum(new.values)
    never = jnp.isnan(total) & jnp.isinf(total)  # orders the reads of a donated store before the writes (see `flow`)
    for i in range(lowest.shape[-1]):
        index = lowest[..., i : i + 1]
        at = jnp.broadcast_to(jnp.minimum(index, last - 1), (len(index), heads, 1))
        itself = index == last

        def of(store: Array, arriving: Array, at: Array = at, itself: Array = itself) -> Array:
            taken = jnp.take_along_axis(store, at.reshape(*at.shape, *(1,) * (store.ndim - 3)), axis=2)
            return jnp.where(itself.reshape(*itself.shape, *(1,) * (store.ndim - 3)), arriving, taken)

        values = jnp.where(never, 0.0, of(parts[0].values, parts[1].values))
        positions = jnp.where(itself, ours, jnp.take_along_axis(body.positions, jnp.minimum(index, last - 1), axis=2))
        loser = Lost(values, positions, of(body.stats, new.stats), full, cache.head_index)
        merged = cache.method.fate.bequeath(loser, parts)
        parts = [dataclasses.replace(part, values=x) for part, x in zip(parts, merged, strict=True)]
    cache = dataclasses.replace(cache, body=dataclasses.replace(body, values=parts[0].values))
    if ring is not None and len(parts) > 2:
        cache = dataclasses.replace(cache, recent=dataclasses.replace(ring, values=parts[2].values))
    return cache, dataclasses.replace(new, values=parts[1].values)
