"""`LayerCache`: the cache of one layer, and `step`, the one thing that attention asks of it."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from kvjax.cache import flow
from kvjax.cache.codec import Identity
from kvjax.cache.layout import CacheDims, Layout
from kvjax.cache.method import CacheMethod
from kvjax.cache.policy import Prompt
from kvjax.cache.prompt import attend_prompt, group_queries, rotate
from kvjax.cache.read import read_cache
from kvjax.cache.segment import Segment
from kvjax.cache.step import Step
from kvjax.typing import Array

Phase = Literal["empty", "prompt", "decode"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """Sinks, body and recent window of one layer.

    Attributes:
      sinks, body, recent: segments; None where the method has none.
      length: int32 [B], tokens each row has seen.
      ring: int32 [B], what a row uses of the recent window's slots.
      limit: int32 [B], body slots that a row may fill before its tokens compete. Both follow the row's own budget.
      head_index: int32 [K], one number per (layer, head) of the whole model, for random draws under sharding.
      method, dims: static. Inside `jax.shard_map` the arrays are smaller than dims says; shapes are read from arrays.
      phase: static. "empty" -> (exact) "decode", or (streaming) "prompt" until `end_prompt`.
    """

    sinks: Segment | None
    body: Segment | None
    recent: Segment | None
    length: Array
    ring: Array
    limit: Array
    head_index: Array
    method: CacheMethod = dataclasses.field(metadata={"static": True})
    dims: CacheDims = dataclasses.field(metadata={"static": True})
    phase: Phase = dataclasses.field(default="empty", metadata={"static": True})

    @classmethod
    def init(cls, method: CacheMethod, dims: CacheDims, prompt_lengths: Array | None = None) -> LayerCache:
        """An empty cache.

        Args:
          prompt_lengths: int32 [B], each row's own prompt; budgets that are shares refer to it. Default: all
            dims.prompt_length.

        Raises:
          UsageError: the method does not fit the dimensions.
        """
        method = method.for_layer(dims)
        layout = method.layout(dims)
        if prompt_lengths is None:
            prompt_lengths = jnp.full((dims.batch,), dims.prompt_length, jnp.int32)
        ring, limit = method.row_slots(layout, prompt_lengths)
        shape = (dims.batch, dims.kv_heads)
        exact, stats = Identity(), method.keeps_statistics
        per_head = method.budget.evicts and method.policy.per_head

        def exact_segment(slots: int, stats: bool) -> Segment | None:
            if slots == 0:
                return None
            return Segment.empty(*shape, slots, dims.head_dim, dims.dtype, exact, exact, per_head=False, stats=stats)

        body = None
        if layout.body:
            body = Segment.empty(
                *shape, layout.body, dims.head_dim, dims.dtype, method.keys, method.values, per_head, stats
            )
        return cls(
            sinks=exact_segment(layout.sinks, False),
            body=body,
            recent=exact_segment(layout.ring, stats),
            length=jnp.zeros((dims.batch,), jnp.int32),
            ring=ring,
            limit=limit,
            head_index=dims.layer * dims.kv_heads + jnp.arange(dims.kv_heads, dtype=jnp.int32),
            method=method,
            dims=dims,
        )

    @property
    def layout(self) -> Layout:
        """Static slots of the three segments."""
        return self.method.layout(self.dims)

    @property
    def segments(self) -> tuple[Segment, ...]:
        """Those that exist, oldest first."""
        return tuple(s for s in (self.sinks, self.body, self.recent) if s is not None)

    def step(self, step: Step) -> tuple[Array, LayerCache]:
        """Attends T new tokens to everything cached and to themselves, and caches them.

        The first step of a method with exact prefill is the whole prompt: it attends to itself exactly and is then
        compressed. Every other step (a chunk of a streaming prefill, a question, a decoded token) reads the cache as
        it is stored, merges that with causal attention within the chunk, and then appends the chunk.

        Returns:
          The attention output [B, T, N, H] in the dtype of the queries, and the new cache.
        """
        step.check(self.head_index.shape[0], self.dims.head_dim)
        if self.phase == "empty" and self.method.prefill == "exact":
            output, log_sum_exp = attend_prompt(step)
            return output, self.absorb_prompt(step, log_sum_exp)
        output, observed, new_stats = read_cache(self, step)
        phase: Phase = (
            "prompt" if self.phase in ("empty", "prompt") and self.method.prefill == "streaming" else "decode"
        )
        return output, flow.append(dataclasses.replace(observed, phase=phase), step, new_stats, after=output)

    def absorb_prompt(self, step: Step, log_sum_exp: Array, unread: int = 0) -> LayerCache:
        """Compresses a prompt whose exact attention is already known.

        Args:
          log_sum_exp: f32 [B, K, G, T].
          unread: how many of each row's last tokens policies see but the cache does not hold; they are the next steps.
        """
        unrotated = step.keys.swapaxes(1, 2)
        keys = rotate(step, unrotated)
        prompt = Prompt(
            queries=rotate(step, group_queries(step)),
            keys=keys,
            values=step.values.swapaxes(1, 2),
            log_sum_exp=log_sum_exp,
            valid=step.valid,
            head_index=self.head_index,
            scale=step.scale,
            window=step.window,
            softcap=step.softcap,
        )
        stored = keys if self.method.positions == "original" else unrotated
        return dataclasses.replace(flow.fill(self, prompt, stored, prompt.lengths - unread), phase="decode")

    def end_prompt(self) -> LayerCache:
        """Marks the end of a streaming prefill: from here on what `every` says holds."""
        return dataclasses.replace(self, phase="decode")
