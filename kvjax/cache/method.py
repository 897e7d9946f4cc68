"""`CacheMethod`: a point in the product of budget, policy, fate, codecs and schedule."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax.numpy as jnp

from kvjax.cache.budget import Budget, Full, Uniform
from kvjax.cache.codec import Codec, Identity
from kvjax.cache.fate import Drop, Fate
from kvjax.cache.layout import CacheDims, Layout, ceil_to, ring_slots
from kvjax.cache.policy import Policy, Recency, Repetition
from kvjax.cache.policy.base import check_word
from kvjax.cache.refusal import check_layer, refusal
from kvjax.cache.selector import ReadAll, Selector
from kvjax.errors import UsageError
from kvjax.typing import Array

FULL, RECENCY, DROP, READ_ALL, EXACT = Full(), Recency(), Drop(), ReadAll(), Identity()
Prefill = Literal["exact", "streaming"]
Positions = Literal["original", "renumbered"]
Rotate = Literal["write", "read"]
Flush = Literal["together", "keys first"]


@dataclasses.dataclass(frozen=True)
class CacheMethod:
    """How one cache keeps its tokens. Frozen and hashable: a static argument of everything compiled.

    Attributes:
      name: for tables; `kvjax.cache.methods` makes names that can be parsed back.
      budget: how many tokens keep a place. policy: which. fate: what becomes of the others.
      selector: what of the body new tokens read.
      keys, values: in which precision the body stores tokens; sinks and recent window are exact.
      sinks: first tokens that are always kept, exactly.
      recent: newest tokens that are always kept, exactly: a number, or (float) a share of the budget.
      prefill: "exact" (the whole prompt attends to itself exactly, then each layer is compressed; what the papers do)
        or "streaming" (chunks attend to the compressed cache and themselves; another algorithm, bounded memory).
      every: tokens compete again each time this many have left the recent window after the prompt (a multiple of the
        block); None means that what is decoded is always kept.
      positions: "original" (keys are rotated by their position in the text) or "renumbered" (by their rank in the
        cache, when they are read, as StreamingLLM does).
      rotate: "write" (keys are stored rotated) or "read" (stored before rotary embedding, and rotated when they are
        read, as KVQuant and CSKV do).
      flush: "together" (keys and values leave the recent window a block at a time) or "keys first" (values leave it one
        by one, but keys are coded all at once whenever the window has been filled anew, as KIVI's release does).
    """

    name: str = "custom"
    budget: Budget = FULL
    policy: Policy = RECENCY
    fate: Fate = DROP
    selector: Selector = READ_ALL
    keys: Codec = EXACT
    values: Codec = EXACT
    sinks: int = 0
    recent: int | float = 0
    prefill: Prefill = "exact"
    every: int | None = None
    positions: Positions = "original"
    rotate: Rotate = "write"
    flush: Flush = "together"

    def __post_init__(self) -> None:
        for field, words in (("prefill", Prefill), ("positions", Positions), ("rotate", Rotate), ("flush", Flush)):
            check_word(self, field, words)
        if reason := refusal(self):
            raise UsageError(f"method {self.name!r} cannot work: {reason}")

    @property
    def block(self) -> int:
        """Tokens that leave the recent window, are evicted and read as a unit."""
        if self.flush == "keys first":
            return self.values.block
        return math.lcm(*(codec.block for codec in self.every_codec))

    @property
    def keeps_statistics(self) -> bool:
        """Whether slots carry the attention that they have received."""
        competes_later = self.every is not None or self.prefill == "streaming"
        kept = self.policy.mass_reduce is not None or self.policy.arrives_scored
        return self.budget.evicts and competes_later and kept

    @property
    def stores_unrotated(self) -> bool:
        """Whether keys are stored before rotary embedding."""
        return self.rotate == "read" or self.positions == "renumbered"

    @property
    def codecs(self) -> tuple[Codec, Codec]:
        """Of keys and values in the body."""
        return self.keys, self.values

    @property
    def every_codec(self) -> tuple[Codec, ...]:
        """Of the body and of what the fate keeps aside."""
        return *self.codecs, *self.fate.codecs

    @property
    def codes(self) -> bool:
        """Whether tokens are stored other than as they are."""
        return any(codec != EXACT for codec in self.every_codec)

    @property
    def calibrated(self) -> bool:
        """Whether a part has to be calibrated to the model before the method can be used."""
        policies = (self.policy,) if self.budget.evicts else ()
        return any(part.calibrated for part in (*self.every_codec, *policies))

    @property
    def repetition(self) -> Repetition | None:
        """The pass over the model that the policy takes its scores from, or None."""
        return self.policy.repetition if self.budget.evicts else None

    @property
    def joint(self) -> bool:
        """Whether heads share a store, so that they cannot be spread over devices."""
        return any(codec.joint for codec in self.every_codec)

    def for_layer(self, dims: CacheDims) -> CacheMethod:
        """This method as one layer uses it: the layer's budget and codecs, no more than a sliding window reaches."""
        recent = self.recent if isinstance(self.recent, int) else 0
        budget = self.budget.for_layer(dims, self.sinks + recent)
        here = dataclasses.replace(self, keys=self.keys.for_layer(dims), values=self.values.for_layer(dims.of_values))
        here = here._with_budget(budget)
        check_layer(here, dims)
        if budget.evicts or dims.window is None or dims.window >= dims.max_length:
            return here
        recent, here = max(recent, 1), dataclasses.replace(here, flush="together")
        window = ceil_to(dims.window, here.block) + here.sinks + ring_slots(recent, here.block)
        return dataclasses.replace(
            here,
            budget=Uniform(tokens_kept=window),
            policy=Recency(),
            fate=DROP,
            selector=READ_ALL,
            recent=recent,
            every=here.block,
        )

    def by_head(self, dims: CacheDims) -> tuple[tuple[tuple[int, ...], CacheMethod], ...]:
        """The kv heads of a layer that share a budget, and their method; nothing where all heads do."""
        groups = self.budget.by_head(dims)
        return tuple((heads, self._with_budget(budget).for_layer(dims)) for heads, budget in groups)

    def _with_budget(self, budget: Budget) -> CacheMethod:
        if self.budget.evicts and not budget.evicts:
            recent = self.recent if isinstance(self.recent, int) else 0
            return dataclasses.replace(self, budget=budget, every=None, recent=recent)
        return dataclasses.replace(self, budget=budget)

    def check(self, dims: CacheDims) -> None:
        """Raises UsageError where a layer of these dimensions has no cache of this method."""
        here = self.for_layer(dims)
        if dims.convolved is not None:
            return
        for part in [part for _, part in here.by_head(dims)] or [here]:
            part.layout(dims)

    def layout(self, dims: CacheDims) -> Layout:
        """Slots of one layer's cache.

        Raises:
          UsageError: the head dimension does not fit a codec, or the budget is smaller than what is always kept.
        """
        self.keys.validate(dims.head_dim)
        self.values.validate(dims.of_values.head_dim)
        if not self.budget.evicts:
            assert isinstance(self.recent, int)
            ring = ring_slots(self.recent, self.block)
            body = ceil_to(dims.max_length - self.sinks - ring, self.block)
            return Layout(self.block, self.sinks, ring, body, self._even(body, dims))
        tokens = self.budget.tokens(dims.prompt_length)
        ring = min(self._ring(tokens), ceil_to(dims.max_length - self.sinks, self.block))
        # A shorter row can have a smaller ring and, by rounding to blocks, one block more in its body.
        kept = max(self._kept(t) for t in range(max(tokens - self.block, 1), tokens + 1))
        self._check_kept(tokens, ring, kept, dims)
        growth, spare = ceil_to(dims.max_length - dims.prompt_length, self.block), 0
        if self.every is not None:
            growth, spare = 0, self.every - self.block
        most = ceil_to(dims.max_length - self.sinks - ring, self.block)
        if self.budget.pooled:  # what is decoded has no place in a pool
            kept = min(kept, max(most - growth, 0))
        kept, room = min(kept, most), min(kept + growth + spare, most)
        apart = kept if self.budget.pooled else 0  # the pool's slots are no part of the segment that decoding fills
        return Layout(self.block, self.sinks, ring, kept, apart + self._even(room - apart, dims))

    def _even(self, slots: int, dims: CacheDims) -> int:
        """Slots rounded up so that no platform pads the rows of the stores."""
        each = self.keys.even_slots(dims), self.values.even_slots(dims.of_values)
        unit = int(self.recent) if self.flush == "keys first" else self.block
        return ceil_to(slots, math.lcm(unit, self.selector.page or 1, *each))

    def _check_kept(self, tokens: int, ring: int, kept: int, dims: CacheDims) -> None:
        needs_body = self.policy.per_head or (self.keys, self.values) != (EXACT, EXACT)
        least = self.sinks + ring + (self.block if needs_body else 0)
        if self.budget.relative or tokens >= min(least, dims.prompt_length):
            return
        raise UsageError(
            f"method {self.name!r}: a budget of {tokens} tokens does not hold {self.sinks} sinks, a recent window of "
            f"{ring} slots (recent={self.recent}, block={self.block}) and at least one block for policy and codecs. "
            f"Raise the budget to {least} tokens or more, or shrink the sinks, the recent window or the codec's group."
        )

    def _ring(self, tokens: int) -> int:
        recent = self.recent if isinstance(self.recent, int) else int(self.recent * tokens + 1e-4)
        return ring_slots(max(recent, self.policy.least_recent), self.block)

    def _kept(self, tokens: int) -> int:
        free = (tokens - self.sinks - self._ring(tokens)) // self.block * self.block
        return max(free, self.block if self.budget.relative else 0)

    def row_slots(self, layout: Layout, prompt_lengths: Array) -> tuple[Array, Array]:
        """What each row uses: slots of the ring, and slots of the body before its tokens compete; int32 [B] each."""
        if not self.budget.evicts:
            return jnp.full_like(prompt_lengths, layout.ring), jnp.full_like(prompt_lengths, layout.body)
        tokens, block = self.budget.row_tokens(prompt_lengths), layout.block
        recent = jnp.int32(self.recent)
        if isinstance(self.recent, float):
            recent = (tokens * jnp.float32(self.recent) + 1e-4).astype(jnp.int32)
        recent = jnp.maximum(recent, self.policy.least_recent)
        ring = jnp.minimum((recent - 2 + block) // block * block + block, layout.ring)
        kept = (tokens - layout.sinks - ring) // block * block
        return jnp.broadcast_to(ring, kept.shape), jnp.clip(kept, block if self.budget.relative else 0, layout.kept)

    def is_no_op(self, dims: CacheDims) -> bool:
        """Whether the budget is so large that nothing of the prompt is evicted and nothing is coded."""
        exact = self.keys == EXACT and self.values == EXACT
        return exact and (not self.budget.evicts or self.budget.tokens(dims.prompt_length) >= dims.prompt_length)
