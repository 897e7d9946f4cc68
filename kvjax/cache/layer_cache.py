"""`LayerCache`: the cache of one layer, and `step`, the one thing that attention asks of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp

from kvjax.cache import flow, hiding
from kvjax.cache.codec import Codec, Identity
from kvjax.cache.fill import fill
from kvjax.cache.layout import CacheDims, Layout
from kvjax.cache.method import CacheMethod
from kvjax.cache.policy import Policy, Prompt, Tokens
from kvjax.cache.pool import Part, Pool
from kvjax.cache.prompt import allocated, attend_prompt
from kvjax.cache.read import read_cache
from kvjax.cache.segment import Segment
from kvjax.cache.step import Step
from kvjax.typing import Array, PyTree

Phase = Literal["empty", "prompt", "decode"]
SEGMENTS = ("sinks", "pool", "body", "aside", "recent")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerData:
    """What calibration has found for one layer: pytrees of arrays [1, K or 1, ...], None for parts without any."""

    keys: PyTree = None
    values: PyTree = None
    policy: PyTree = None


NO_DATA = LayerData()


def blank_data(method: CacheMethod, dims: CacheDims) -> LayerData:
    """Zeros in place of what calibration finds, for one layer of a method: the shapes that it has to have."""
    here = method.for_layer(dims)

    def zeros(part: Codec | Policy, dims: CacheDims = dims) -> PyTree:
        shapes = part.parameter_shapes(dims) if part.calibrated else None
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    policy = zeros(here.policy) if here.budget.evicts else None
    return LayerData(zeros(here.keys), zeros(here.values, dims.of_values), policy)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """Sinks, body and recent window of one layer.

    Attributes:
      sinks, body, recent: segments; None where the method has none.
      pool: what the body keeps of the prompt, where heads share their budget; then the body holds later tokens.
      aside: the segment of the method's fate, or None.
      length: int32 [B], tokens each row has seen.
      ring: int32 [B], what a row uses of the recent window's slots.
      limit: int32 [B], body slots that a row may fill before its tokens compete. Both follow the row's own budget.
      head_index: int32 [K], one number per (layer, head) of the whole model, for random draws under sharding.
      index: what the method's selector knows of the body's pages and remembers, leaves [B, K, ...], or None.
      state: the policy's state, leaves [B, K, ...], or None.
      data: what the policy was calibrated to, leaves [K, ...] or shared, or None.
      hiding: f32 [B, max_length], what tokens hide (`kvjax.cache.hiding`), where they do.
      head_map: int32 [B, N], the kv head that each query head reads, where the prompt decides it.
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
    pool: Pool | None = None
    aside: Segment | None = None
    index: PyTree = None
    state: PyTree = None
    data: PyTree = None
    hiding: Array | None = None
    head_map: Array | None = None
    phase: Phase = dataclasses.field(default="empty", metadata={"static": True})

    @classmethod
    def init(
        cls,
        method: CacheMethod,
        dims: CacheDims,
        prompt_lengths: Array | None = None,
        data: LayerData = NO_DATA,
    ) -> LayerCache:
        """An empty cache.

        Args:
          prompt_lengths: int32 [B], each row's own prompt; budgets that are shares refer to it. Default: all
            dims.prompt_length.
          data: what calibrated parts need.

        Raises:
          UsageError: the method does not fit the dimensions.
        """
        method = method.for_layer(dims)
        layout = method.layout(dims)
        if prompt_lengths is None:
            prompt_lengths = jnp.full((dims.batch,), dims.prompt_length, jnp.int32)
        ring, limit = method.row_slots(layout, prompt_lengths)
        exact, stats = Identity(), method.keeps_statistics
        per_head = method.budget.evicts and method.policy.per_head

        def exact_segment(slots: int, stats: bool) -> Segment | None:
            if slots == 0:
                return None
            return Segment.empty(dims, slots, exact, exact, per_head=False, stats=stats)

        learnt, body, pool, slots = (data.keys, data.values), None, None, layout.body
        if method.budget.pooled:
            slots -= layout.kept
            pool = Pool.empty(dims, layout.kept, method.keys, method.values, learnt)
        if slots:
            body = Segment.empty(dims, slots, method.keys, method.values, per_head=per_head, stats=stats, data=learnt)
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
            pool=pool,
            index=method.selector.index(dims, slots // method.selector.page) if method.selector.page else None,
            aside=method.fate.aside(dims, layout, per_head) if method.budget.evicts else None,
            state=method.policy.initial_state(dims) if method.budget.evicts else None,
            data=method.policy.parameters(dims, data.policy) if method.budget.evicts else None,
            hiding=jnp.zeros((dims.batch, dims.max_length), jnp.float32) if dims.selective else None,
            head_map=jnp.zeros((dims.batch, dims.query_heads), jnp.int32) if dims.mapped else None,
        )

    @property
    def parts(self) -> tuple[LayerCache, ...]:
        """The caches that the kv heads are spread over: this one has them all (`HeadSplit.parts`)."""
        return (self,)

    @property
    def layout(self) -> Layout:
        """Static slots of the three segments."""
        return self.method.layout(self.dims)

    @property
    def segments(self) -> tuple[Part, ...]:
        """What attention reads: those that exist, oldest first."""
        return tuple(s for name in SEGMENTS if (s := getattr(self, name)) is not None)

    def with_segments(self, segments: Sequence[Part]) -> LayerCache:
        """This cache with others in place of `segments`."""
        names = [name for name in SEGMENTS if getattr(self, name) is not None]
        return dataclasses.replace(self, **dict(zip(names, segments, strict=True)))

    def numbered(self, head_index: Array) -> LayerCache:
        """This cache with other numbers int32 [K] for its heads."""
        return dataclasses.replace(self, head_index=head_index)

    def step(self, step: Step) -> tuple[Array, LayerCache]:
        """Attends T new tokens to everything cached and to themselves, and caches them.

        The first step of a method with exact prefill is the whole prompt: it attends to itself exactly and is then
        compressed. Every other step (a chunk of a streaming prefill, a question, a decoded token) reads the cache as
        it is stored, merges that with causal attention within the chunk, and then appends the chunk.

        Returns:
          The attention output [B, T, N, H'] in the dtype of the queries, and the new cache.
        """
        output, store = self.read(step)
        return output, store(output)

    def read(self, step: Step) -> tuple[Array, Callable[[Array], LayerCache]]:
        """The first half of `step`: the output, and what stores the tokens once all that depends on the old cache, an
        array which it is given, has been computed."""
        step.check(self.head_index.shape[0], self.dims.head_dim, self.dims.of_values.head_dim)
        hiding.check(step, self.hiding)
        if self.phase == "empty":
            step = allocated(step)
        elif self.head_map is not None:
            step = dataclasses.replace(step, head_map=self.head_map)
        if self.phase == "empty" and self.method.prefill == "exact":
            output, log_sum_exp = attend_prompt(step)
            return output, lambda after: self.absorb_prompt(step, log_sum_exp)
        streams = self.phase in ("empty", "prompt") and self.method.prefill == "streaming"
        cache = dataclasses.replace(self, phase="prompt" if streams else "decode", head_map=self._map_of(step))
        if self.hiding is not None and step.valid.shape[1] > 1:
            output, stored = _one_by_one(cache, step)
            return output, lambda after: stored
        tokens = Tokens(step, self.head_index, self.state, self.data, decoding=not streams)
        output, observed, new_stats = read_cache(cache, tokens)
        return output, lambda after: flow.append(observed, tokens, new_stats, after=after)

    def _map_of(self, step: Step) -> Array | None:
        return None if self.head_map is None else step.head_map

    def absorb_prompt(self, step: Step, log_sum_exp: Array, unread: int = 0, scores: Array | None = None) -> LayerCache:
        """Compresses a prompt whose exact attention is already known.

        Args:
          log_sum_exp: f32 [B, K, G, T].
          unread: how many of each row's last tokens policies see but the cache does not hold; they are the next steps.
          scores: f32 [B, K, T] of a policy that has them from a pass over the model of its own, or None.
        """
        step = allocated(step)
        prompt = Prompt(step, self.head_index, self.state, self.data, log_sum_exp, scores)
        lengths = prompt.lengths - unread
        filled = fill(self, prompt, lengths)
        told = None
        if self.hiding is not None:
            seen = dataclasses.replace(step, valid=step.valid & (step.positions < lengths[:, None]))
            told = self.hiding.at[:, : step.valid.shape[1]].set(hiding.of_prompt(seen))
        return dataclasses.replace(filled, phase="decode", hiding=told, head_map=self._map_of(step))

    def end_prompt(self) -> LayerCache:
        """Marks the end of a streaming prefill: from here on what `every` says holds."""
        return self.in_phase("decode")

    def in_phase(self, phase: Phase) -> LayerCache:
        """This cache in another phase."""
        return dataclasses.replace(self, phase=phase)


def _one_by_one(cache: LayerCache, step: Step) -> tuple[Array, LayerCache]:
    """`step`, token by token: where tokens hide others, each query sees what the one before it has left.

    The cache is in the phase of the step already.
    """
    by_token = {name: getattr(step, name) for name in ("queries", "keys", "values", "positions", "valid")}
    inner = None if step.latent is None else step.latent.queries
    leaves = jax.tree.map(lambda x: x.swapaxes(0, 1)[:, :, None], (by_token, step.hidden, inner))

    def one(cache: LayerCache, parts: tuple[dict[str, Array], Array | None, Array | None]) -> tuple[LayerCache, Array]:
        mine, layer_input, queries = parts
        latent = step.latent if step.latent is None else dataclasses.replace(step.latent, queries=queries)
        output, cache = cache.step(dataclasses.replace(step, **mine, hidden=layer_input, latent=latent))
        return cache, output[:, 0]

    cache, outputs = jax.lax.scan(one, cache, leaves)
    return outputs.swapaxes(0, 1), cache
