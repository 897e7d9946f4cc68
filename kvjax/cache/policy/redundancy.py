"""Keep what the last queries look at and no later token repeats."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from kvjax.cache.layout import CacheDims
from kvjax.cache.policy.base import Policy
from kvjax.cache.policy.seen import Prompt, Slots, Tokens
from kvjax.errors import UsageError
from kvjax.typing import Array, PyTree
from pallas_kernels.lanes import CACHE_BYTES, over_lanes

NOBODY = -1


@dataclasses.dataclass(frozen=True)
class Redundancy(Policy):
    """R-KV (Cai et al., 2025, arXiv 2505.24133): score = lambda · importance - (1 - lambda) · redundancy.

    Importance: logits of the last `window` queries, the largest over a group's query heads; softmax over the keys
    before the window; mean over the queries; the largest within `kernel` neighbours among the cached tokens in order of
    time. Redundancy: each key's mean cosine to all cached keys, window included, where every key leaves out itself and
    the newest of those that resemble it (cosine above `threshold`), so that of repetitions the last one stays; softmax.

    The state is the last `window` queries, f32 [B, K, window, G, H] times the logits' scale, and their keys.

    Attributes:
      window: 8 in the release.
      kernel: odd width of the pooling. 7 in the release.
      mix: lambda. 0.1 in the paper, 0.07 in the code of the release.
      threshold: 0.5 in the release.
    """

    window: int = 8
    kernel: int = 7
    mix: float = 0.1
    threshold: float = 0.5

    def __post_init__(self) -> None:
        if self.window < 1 or self.kernel < 1 or self.kernel % 2 == 0 or not 0 <= self.mix <= 1:
            raise UsageError(f"Redundancy needs window >= 1, an odd kernel >= 1 and mix in [0, 1]; got {self}")

    @property
    def least_recent(self) -> int:
        return self.window

    def initial_state(self, dims: CacheDims) -> PyTree:
        shape = (dims.batch, dims.kv_heads, self.window)
        group = dims.query_heads // dims.kv_heads
        return {
            "queries": jnp.zeros((*shape, group, dims.key_width), jnp.float32),
            "keys": jnp.zeros((*shape, dims.key_width), dims.dtype),
        }

    def next_state(self, state: PyTree, tokens: Tokens) -> PyTree:
        queries, keys, places = tokens.last(self.window)
        if queries.shape[2] != state["queries"].shape[3]:
            raise UsageError("Redundancy needs as many query heads for every kv head")
        new = {"queries": queries.swapaxes(2, 3) * jnp.float32(tokens.step.scale), "keys": keys}
        # Fewer new tokens than the window holds push as many old ones out.
        older = jnp.minimum(jnp.arange(self.window, dtype=jnp.int32) + tokens.count[:, None], self.window - 1)

        def joined(old: Array, x: Array) -> Array:
            shape = (old.shape[0], 1, self.window, *(1,) * (old.ndim - 3))
            kept = jnp.take_along_axis(old, older.reshape(shape), axis=2)
            return jnp.where((places >= 0).reshape(shape), x.astype(old.dtype), kept)

        return jax.tree.map(joined, state, new)

    def prompt_scores(self, prompt: Prompt) -> Array:
        state = self.next_state(prompt.state, prompt)
        positions = jnp.where(prompt.valid, prompt.positions, -1)[:, None]
        past = positions < prompt.lengths[:, None, None] - self.window
        return self._scores(state, prompt.lengths, prompt.keys, positions, past & (positions >= 0))

    def slot_scores(self, slots: Slots) -> Array:
        count = slots.keys.shape[2]
        window = slots.seen[:, None] - self.window + jnp.arange(self.window, dtype=jnp.int32)
        window = jnp.broadcast_to(window[:, None], (*slots.positions.shape[:2], self.window))
        positions = jnp.concatenate([slots.positions, jnp.maximum(window, -1)], axis=-1)
        keys = jnp.concatenate([slots.keys, slots.state["keys"].astype(slots.keys.dtype)], axis=2)
        past = (positions >= 0) & (jnp.arange(positions.shape[-1]) < count)
        return self._scores(slots.state, slots.seen, keys, positions, past)[..., :count]

    def _scores(self, state: PyTree, seen: Array, keys: Array, positions: Array, past: Array) -> Array:
        """f32 [B, K, S] of keys [B, K, S, H] at positions int32 [B, K or 1, S] (-1: none); past: before the window."""
        exists = positions >= 0
        keys = jnp.where(exists[..., None], keys, 0).astype(jnp.float32)
        redundancy = jax.nn.softmax(jnp.where(exists, self._similarity(keys, positions), -jnp.inf), axis=-1)
        logits = jnp.einsum("bkwgh,bksh->bkwgs", state["queries"], keys).max(axis=3)
        attention = jax.nn.softmax(jnp.where(past[:, :, None], logits, -jnp.inf), axis=-1, where=past[:, :, None])
        looked = jnp.arange(self.window) >= self.window - seen[:, None]
        count = jnp.maximum(looked.sum(-1), 1)[:, None, None]
        attention = jnp.sum(attention, axis=2, where=looked[:, None, :, None]) / count
        return self.mix * self._pooled(attention, positions, past) - (1 - self.mix) * redundancy

    def _pooled(self, attention: Array, positions: Array, past: Array) -> Array:
        """The largest among neighbours in order of time; what is not `past` is nobody's neighbour."""
        order = jnp.argsort(jnp.where(past, positions, jnp.iinfo(jnp.int32).max), axis=-1)
        order = jnp.broadcast_to(order, attention.shape)
        half = self.kernel // 2
        in_time = jnp.take_along_axis(jnp.where(past, attention, 0.0), order, axis=-1)
        pooled = jax.lax.reduce_window(
            in_time, -jnp.inf, jax.lax.max, (1, 1, self.kernel), (1, 1, 1), ((0, 0), (0, 0), (half, half))
        )
        return jnp.take_along_axis(pooled, jnp.argsort(order, axis=-1), axis=-1)

    def _similarity(self, keys: Array, positions: Array) -> Array:
        """f32 [B, K, S]: each key's mean cosine to the others, as the class says.

        The sum of a key's cosines to all others is one product; what is charged less is one pair per key.
        """
        unit = keys / jnp.maximum(jnp.linalg.norm(keys, axis=-1, keepdims=True), 1e-8)
        order = jnp.broadcast_to(jnp.argsort(positions, axis=-1), keys.shape[:3])
        exists = jnp.take_along_axis(jnp.broadcast_to(positions, order.shape), order, axis=-1) >= 0
        age = jnp.where(exists, jnp.arange(order.shape[-1], dtype=jnp.int32), NOBODY)
        age = jnp.put_along_axis(jnp.zeros_like(age), order, age, axis=-1, inplace=False)
        newest = self._newest_alike(unit, age)
        other = jnp.take_along_axis(order, jnp.maximum(newest, 0), axis=-1)
        cosine = jnp.sum(unit * jnp.take_along_axis(unit, other[..., None], axis=2), axis=-1)
        whole = jnp.sum(unit * (unit.sum(2, keepdims=True) - unit), axis=-1)
        row, head = jnp.arange(order.shape[0])[:, None, None], jnp.arange(order.shape[1])[:, None]
        total = whole.at[row, head, other].add(jnp.where(newest == NOBODY, 0.0, -cosine))
        return total / jnp.maximum((positions >= 0).sum(-1, keepdims=True), 1)

    def _newest_alike(self, unit: Array, age: Array) -> Array:
        """int32 [B, K, S]: the largest age among the keys that resemble each key, or NOBODY; never all S x S cosines.

        unit f32 [B, K, S, H]; age int32 [B, K, S], different for all keys, NOBODY for slots without one.
        """
        batch, heads, slots, width = unit.shape
        size = min(slots, max(8, CACHE_BYTES // (8 * slots)))

        def of_lane(keys: Array, ages: Array) -> Array:
            def block(own: tuple[Array, Array]) -> Array:
                rows, row_ages = own
                # Keys lead: a maximum over the leading axis is taken in whole vectors.
                alike = (jnp.einsum("sh,rh->sr", keys, rows) > self.threshold) & (ages[:, None] != row_ages)
                return jnp.max(jnp.where(alike, ages[:, None], NOBODY), axis=0)

            more = -slots % size
            rows = jnp.pad(keys, ((0, more), (0, 0))).reshape(-1, size, width)
            row_ages = jnp.pad(ages, (0, more), constant_values=NOBODY).reshape(-1, size)
            return jax.lax.map(block, (rows, row_ages)).reshape(-1)[:slots]

        lanes = unit.reshape(-1, slots, width), age.reshape(-1, slots)
        newest = over_lanes(jax.vmap(of_lane), lanes, CACHE_BYTES // (8 * slots * size))
        return newest.reshape(batch, heads, slots)
