"""Drives one layer's cache as attention does: a prompt of padded rows, then one decoded token after the other."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.cache.head_split import AnyLayer, HeadSplit, empty_layer
from kvjax.cache.layout import CacheDims
from kvjax.cache.method import CacheMethod
from kvjax.cache.pool import Part, Pool
from kvjax.cache.prompt import attend_prompt
from kvjax.cache.segment import Segment
from kvjax.cache.step import Step
from pallas_kernels.rope import Rope
from tests.cache.calibrated import data_of
from tests.oracles.row import Row

THETA = 10000.0

# Hundreds of small programs are compiled and each runs for milliseconds: XLA's optimisations cost more than they save.
_QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}


def _known(option: str) -> bool:
    """Whether this XLA has a compiler option; they come and go with its versions."""
    try:
        jax.jit(lambda: jnp.zeros(()), compiler_options={option: _QUICK[option]})()
    except jax.errors.JaxRuntimeError:
        return False
    return True


QUICK = {option: value for option, value in _QUICK.items() if _known(option)}


@dataclasses.dataclass(frozen=True)
class Setup:
    """Everything static: one compile per value (and batch).

    chunk: tokens per step of a streaming prefill. together: tokens per step after the prompt.
    """

    method: CacheMethod
    dims: CacheDims
    chunk: int = 64
    together: int = 1
    softcap: float | None = None
    reads: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Inputs:
    """float32 q [B, T + D, N, H], k and v [B, T + D, K, H] before rotary.

    Row b's prompt is its first lengths[b] <= T tokens, the D tokens that follow are decoded. `junk` fills what pads
    the prompts to T.
    """

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    lengths: tuple[int, ...]
    padded: int
    junk: float = 3.0

    @property
    def decoded(self) -> int:
        return self.q.shape[1] - self.padded

    def row(self, b: int, setup: Setup) -> Row:
        """Row b for the transcriptions."""
        tokens = self.lengths[b] + self.decoded
        q, k, v = (x[b, :tokens].astype(np.float64) for x in (self.q, self.k, self.v))
        return Row(q, k, v, self.lengths[b], THETA, setup.reads, setup.dims.window, setup.softcap)

    def take(self, rows: Sequence[int]) -> Inputs:
        """The batch of the named rows."""
        index = list(rows)
        lengths = tuple(self.lengths[b] for b in index)
        return dataclasses.replace(self, q=self.q[index], k=self.k[index], v=self.v[index], lengths=lengths)

    def prompt(self) -> tuple[np.ndarray, ...]:
        """q, k, v [B, T, ...], padded with junk."""
        exists = np.arange(self.padded) < np.array(self.lengths)[:, None]
        return tuple(
            np.where(exists[..., None, None], x[:, : self.padded], self.junk) for x in (self.q, self.k, self.v)
        )

    def later(self, together: int = 1) -> tuple[np.ndarray, ...]:
        """q, k, v [D / together, B, together, ...], each row's own next tokens."""
        index = np.array(self.lengths) + np.arange(self.decoded).reshape(-1, together)[..., None]
        rows = np.arange(len(self.lengths))
        return tuple(x[rows, index].swapaxes(1, 2) for x in (self.q, self.k, self.v))


def draw(
    seed: int,
    lengths: Sequence[int],
    *,
    padded: int,
    decoded: int,
    query_heads: int,
    kv_heads: int = 2,
    head_dim: int = 32,
) -> Inputs:
    """Normal inputs; queries twice as large, so that attention is far from uniform."""
    rng = np.random.default_rng(seed)
    shape = (len(lengths), padded + decoded)
    q, k, v = (rng.standard_normal((*shape, n, head_dim), np.float32) for n in (query_heads, kv_heads, kv_heads))
    return Inputs(2 * q, k, v, tuple(lengths), padded)


def dims_of(inputs: Inputs, **changes: object) -> CacheDims:
    """The dimensions that `inputs` need."""
    batch, tokens, query_heads, head_dim = inputs.q.shape
    kv_heads = inputs.k.shape[2]
    dims = CacheDims(batch, kv_heads, query_heads, head_dim, tokens, inputs.padded, "float32")
    dims = dataclasses.replace(dims, width=2 * kv_heads * head_dim)
    return dataclasses.replace(dims, **changes)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Run:
    """prompt_output [B, T, N, H], outputs [D, B, N, H], held int32 [steps + 1, B, K, S] (-1: empty), the last cache."""

    prompt_output: jax.Array
    outputs: jax.Array
    held: jax.Array
    cache: AnyLayer

    def kept(self, i: int, b: int, head: int) -> list[int]:
        """The sorted positions after the prompt (i = 0) or after step i."""
        return sorted(int(p) for p in np.asarray(self.held[i, b, head]) if p >= 0)


def rope(head_dim: int) -> Rope:
    """Plain rotary frequencies."""
    frequencies = THETA ** (-np.arange(0, head_dim, 2) / head_dim)
    return Rope(jnp.asarray(frequencies, jnp.float32), jnp.float32(1.0))


def output_projection(query_heads: int, head_dim: int, width: int) -> np.ndarray:
    """f32 [N, H, D], always the same."""
    return np.random.default_rng(5).standard_normal((query_heads, head_dim, width), np.float32)


def step_of(setup: Setup, arrays: Sequence[jax.Array], lengths: jax.Array, valid: jax.Array) -> Step:
    """The step that appends q, k, v [B, T, ...] to rows of `lengths`; a token's keys and values are its layer input."""
    q, k, v = arrays
    hidden = jnp.concatenate([x.reshape(*x.shape[:2], -1) for x in (k, v)], axis=-1)
    return Step(
        queries=q,
        keys=k,
        values=v,
        positions=lengths[:, None] + jnp.arange(q.shape[1], dtype=jnp.int32),
        valid=valid,
        rope=rope(q.shape[-1]),
        hidden=hidden,
        output_projection=jnp.asarray(output_projection(*q.shape[2:], hidden.shape[-1])),
        scale=q.shape[-1] ** -0.5,
        window=setup.dims.window,
        softcap=setup.softcap,
        kv_head_of_query=setup.reads,
    )


def held(cache: AnyLayer) -> jax.Array:
    """int32 [B, K, S]: the position in every slot of all segments that hold tokens as they came; -1 where empty."""
    if isinstance(cache, HeadSplit):
        parts = [held(part) for part in cache.parts]
        most = max(part.shape[-1] for part in parts)
        parts = [jnp.pad(part, ((0, 0), (0, 0), (0, most - part.shape[-1])), constant_values=-1) for part in parts]
        order = jnp.argsort(jnp.asarray([head for group in cache.heads for head in group]))
        return jnp.concatenate(parts, axis=1)[:, order]
    heads = cache.head_index.shape[0]
    found = [_by_head(segment, heads) for segment in cache.segments]
    return jnp.concatenate([positions for positions in found if positions is not None], axis=-1)


def _by_head(segment: Part, heads: int) -> jax.Array | None:
    if isinstance(segment, Pool):
        mine = segment.owner[:, None, :, None] == jnp.arange(heads)[:, None, None]
        positions = jnp.where(mine, segment.positions[:, None], -1)
        return positions.reshape(*positions.shape[:2], -1)
    if segment.weight is not None:
        return None
    return jnp.broadcast_to(segment.positions, (segment.positions.shape[0], heads, segment.slots))


def poisoned(cache: AnyLayer, value: jax.Array) -> AnyLayer:
    """An empty cache whose stores hold `value`; where it is not 0 and they hold integers, ones in every bit."""

    if isinstance(cache, HeadSplit):
        return dataclasses.replace(cache, parts=tuple(poisoned(part, value) for part in cache.parts))

    def spoil(leaf: jax.Array) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.full_like(leaf, value)
        return jnp.where(value == 0, leaf, ~jnp.zeros_like(leaf))

    def spoil_segment(segment: Segment | None) -> Segment | None:
        if segment is None:
            return None
        return dataclasses.replace(
            segment, keys=jax.tree.map(spoil, segment.keys), values=jax.tree.map(spoil, segment.values)
        )

    spoiled = {name: spoil_segment(getattr(cache, name)) for name in ("sinks", "body", "aside", "recent")}
    pool = None if cache.pool is None else dataclasses.replace(cache.pool, pages=spoil_segment(cache.pool.pages))
    return dataclasses.replace(cache, pool=pool, **spoiled)


def begin(cache: AnyLayer, step: Step) -> tuple[jax.Array, AnyLayer]:
    """The first step. A policy whose scores the engine would bring gets each token's first channel of its key."""
    if cache.method.repetition is None:
        return cache.step(step)
    output, log_sum_exp = attend_prompt(step)
    return output, cache.absorb_prompt(step, log_sum_exp, scores=step.keys[..., 0].swapaxes(1, 2))


def prefill(
    setup: Setup, cache: AnyLayer, arrays: Sequence[jax.Array], lengths: jax.Array
) -> tuple[jax.Array, AnyLayer]:
    """One step where the method's prefill is exact; else equal chunks, the last one padded."""
    tokens = arrays[0].shape[1]
    chunk = tokens if setup.method.prefill == "exact" else setup.chunk
    count = -(-tokens // chunk)
    arrays = [jnp.pad(x, [(0, 0), (0, count * chunk - tokens), (0, 0), (0, 0)]) for x in arrays]
    chunks = [x.reshape(x.shape[0], count, chunk, *x.shape[2:]).swapaxes(0, 1) for x in arrays]

    def part(cache: AnyLayer, start: jax.Array, *parts: jax.Array) -> Step:
        return step_of(setup, parts, cache.length, start + jnp.arange(chunk) < lengths[:, None])

    def advance(cache: AnyLayer, args: tuple) -> tuple[AnyLayer, jax.Array]:
        output, cache = cache.step(part(cache, *args))
        return cache, output

    starts = jnp.arange(count) * chunk
    first, cache = begin(cache, part(cache, starts[0], *(x[0] for x in chunks)))
    outputs = first[None]
    if count > 1:
        cache, others = jax.lax.scan(advance, cache, (starts[1:], *(x[1:] for x in chunks)))
        outputs = jnp.concatenate([outputs, others])
    outputs = outputs.swapaxes(0, 1).reshape(first.shape[0], count * chunk, *first.shape[2:])
    return outputs[:, :tokens], cache.end_prompt()


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def _run(setup: Setup, prompt: tuple, later: tuple, lengths: jax.Array, poison: jax.Array) -> Run:
    cache = empty_layer(setup.method, setup.dims, lengths, data_of(setup.method, setup.dims))
    cache = poisoned(cache, poison)
    prompt_output, cache = prefill(setup, cache, prompt, lengths)
    after_prompt = held(cache)

    def decode(cache: AnyLayer, arrays: tuple) -> tuple[AnyLayer, tuple]:
        valid = jnp.ones(arrays[0].shape[:2], bool)
        output, cache = cache.step(step_of(setup, arrays, cache.length, valid))
        return cache, (output.swapaxes(0, 1), held(cache))

    cache, (outputs, after) = jax.lax.scan(decode, cache, later)
    outputs = outputs.reshape(-1, *outputs.shape[2:])
    return Run(prompt_output, outputs, jnp.concatenate([after_prompt[None], after]), cache)


def run(setup: Setup, inputs: Inputs, poison: float = 0.0) -> Run:
    """The whole of `inputs` through a fresh cache whose slots hold `poison`; compiled once per setup and shape."""
    lengths = jnp.asarray(inputs.lengths, jnp.int32)
    return _run(setup, inputs.prompt(), inputs.later(setup.together), lengths, jnp.float32(poison))
