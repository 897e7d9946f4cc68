"""Values of losers live on in those of the tokens that follow them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kvjax.cache.fate.base import Fate, Kept, Lost
from kvjax.cache.policy.random import hash_uniform
from kvjax.cache.policy.seen import Prompt
from kvjax.cache.segment import at_positions, where_true
from kvjax.errors import UsageError
from kvjax.typing import Array
from pallas_kernels.cache_update.xla import put

LATEST = jnp.iinfo(jnp.int32).max


@dataclasses.dataclass(frozen=True)
class Merge(Fate):
    """CaM (Zhang et al., 2024, "CaM: Cache Merging for Memory-efficient LLMs Inference", ICML).

    When token i loses its place, each of the next m tokens that are kept gets m-th part of its value, all or none of
    them: with probability min(1, a_i / mean of their a_j), where a is the attention that a token has received so far.
    Its key is forgotten. Draws depend on seed, layer, head and position alone. Tokens that lose at the end of a prompt
    give their values at once, as the prompt had them; later a token gives on what it has been given itself.

    Attributes:
      following: m, how many kept tokens share the value (32 in the release); fewer where fewer follow.
      seed: of the draws.
    """

    following: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        if self.following < 1:
            raise UsageError(f"Merge: following is at least 1; got {self.following}")

    @property
    def summary(self) -> str:
        return f"values merged into the {self.following} that follow"

    @property
    def merges(self) -> bool:
        return True

    def carried(self, kept: Array, lost: Array, mass: Array, most: int, prompt: Prompt) -> Array:
        values, tokens = prompt.values, lost.shape[-1]
        heads = mass.shape[1]
        kept, lost = (jnp.broadcast_to(x, (len(x), heads, tokens)) for x in (kept, lost))
        order = where_true(kept, most, 1)
        number = (order >= 0).sum(-1, dtype=jnp.int32)[..., None]
        first = jnp.cumsum(kept, axis=-1, dtype=jnp.int32)
        count = jnp.minimum(self.following, number - first)
        # Sums over the kept tokens before each rank, from 0 to `most`.
        sums = jnp.cumsum(jnp.where(order >= 0, at_positions(mass, order), 0.0), axis=-1)
        sums = jnp.pad(sums, ((0, 0), (0, 0), (1, 0)))
        ends, starts = (jnp.take_along_axis(sums, jnp.minimum(i, number), axis=-1) for i in (first + count, first))
        drawn = self._drawn(mass, ends - starts, count, prompt.positions[:, None], prompt.head_index)
        share = jnp.where(lost & drawn, 1.0 / jnp.maximum(count, 1), 0.0)
        gift = jnp.where(lost[..., None], values.astype(jnp.float32), 0.0) * share[..., None]
        # All that is given by tokens before the kept one of rank r and after that of rank r - 1; then m ranks of it.
        b, k = jnp.arange(len(kept))[:, None, None], jnp.arange(heads)[None, :, None]
        given = jnp.zeros((len(kept), heads, order.shape[-1], values.shape[-1])).at[b, k, first].add(gift, mode="drop")
        window = (1, 1, min(self.following, order.shape[-1]), 1)
        given = jax.lax.reduce_window(
            given, 0.0, jax.lax.add, window, (1,) * 4, ((0, 0), (0, 0), (window[2] - 1, 0), (0, 0))
        )
        return _added(values, order, given)

    def bequeath(self, lost: Lost, kept: Sequence[Kept]) -> list[Array]:
        heads = lost.values.shape[1]

        def joined(arrays: Sequence[Array]) -> Array:
            return jnp.concatenate([jnp.broadcast_to(x, (len(x), heads, x.shape[-1])) for x in arrays], axis=-1)

        positions = joined([part.positions for part in kept])
        later = jnp.where(positions > lost.positions, positions, LATEST)
        place, slot = jax.lax.top_k(-later, min(self.following, later.shape[-1]))
        follows = -place < LATEST
        count = follows.sum(-1, keepdims=True)
        mass = jnp.take_along_axis(joined([part.mass for part in kept]), slot, axis=-1)
        total = jnp.where(follows, mass, 0.0).sum(-1, keepdims=True)
        drawn = self._drawn(lost.mass, total, count, lost.positions, lost.head_index) & lost.present[..., None]
        gift = lost.values.astype(jnp.float32) / jnp.maximum(count, 1)[..., None]
        slot = jnp.where(follows & drawn, slot, positions.shape[-1])
        return [_added(part.values, slot - start, gift) for part, start in zip(kept, _starts(kept), strict=True)]

    def _drawn(self, mass: Array, total: Array, count: Array, positions: Array, head_index: Array) -> Array:
        """Whether a token of attention `mass` is merged into `count` tokens of attention `total`."""
        probability = jnp.where(total > 0, mass * count / jnp.where(total > 0, total, 1.0), mass > 0)
        return (hash_uniform(self.seed, head_index, positions) < probability) & (count > 0)


def _starts(kept: Sequence[Kept]) -> list[int]:
    """The number of each part's first slot when the parts are joined."""
    sizes = [part.positions.shape[-1] for part in kept]
    return [sum(sizes[:i]) for i in range(len(sizes))]


def _added(values: Array, slot: Array, gift: Array) -> Array:
    """values [B, K, S, H] with gift f32 [B, K, 1 or m, H] added at slots int32 [B, K, m] that exist, none twice."""
    slots = values.shape[2]
    slot = jnp.where((slot >= 0) & (slot < slots), slot, slots)
    old = at_positions(values, jnp.minimum(slot, slots - 1)).astype(jnp.float32)
    return put(values, (old + gift).astype(values.dtype), slot)
