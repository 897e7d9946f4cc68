"""Caches in every state that can be saved or sharded: random prompts and decode steps, without a model.

Every run is made once per process; tests share the results and must not donate them.
"""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.cache.layout import CacheDims
from kvjax.cache.methods import parse
from kvjax.cache.model_cache import ModelCache
from kvjax.cache.step import Step
from pallas_kernels.rope import Rope
from tests.cache.calibrated import data_of
from tests.cache.cases import NAMED
from tests.cache.driver import begin, output_projection

# One of each way to store and to evict; the slow tests take every named method.
CORE = re.compile(
    r"(full|h2o|streaming_llm.*renumbered|tova|kivi-2|mikv|quest|int8_channel|kvcrush|cskv:window=16)(:|$)"
)
SPECS = [
    spec if CORE.match(spec) else pytest.param(spec, marks=pytest.mark.slow) for spec in (*NAMED, "h2o:tokens=24+int8")
]
FAST_COMPILE = {"xla_backend_optimization_level": 0}

B, K, N, H, PROMPT, STEPS = 4, 4, 8, 32, 64, 8
WIDTH = 48
LENGTHS = np.array([64, 31, 45, 5], np.int32)


def dims(dtype: str = "float32", layer: int = 0) -> CacheDims:
    return CacheDims(B, K, N, H, PROMPT + STEPS, PROMPT, dtype, layer=layer, width=WIDTH)


def empty(spec: str, layers: int = 1, dtype: str = "float32") -> ModelCache:
    method, each = parse(spec), [dims(dtype, i) for i in range(layers)]
    return ModelCache.init(method, each, jnp.asarray(LENGTHS), [data_of(method, d) for d in each])


def rope() -> Rope:
    return Rope(1e4 ** -(jnp.arange(H // 2, dtype=jnp.float32) / (H // 2)), jnp.ones(()))


def make_step(seed: int, positions: np.ndarray, valid: np.ndarray) -> Step:
    """Random queries, keys, values and layer inputs at positions int32 [B, T]; always the same output projection."""
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((*positions.shape, heads, H), np.float32) for heads in (N, K, K))
    hidden = rng.standard_normal((*positions.shape, WIDTH), np.float32)
    projection = output_projection(N, H, WIDTH)
    step = Step(q, k, v, positions, valid, rope(), hidden, projection, scale=H**-0.5)
    return jax.tree.map(jnp.asarray, step)


def prompt_step() -> Step:
    positions = np.broadcast_to(np.arange(PROMPT, dtype=np.int32), (B, PROMPT))
    return make_step(0, positions, positions < LENGTHS[:, None])


def decode_steps() -> Step:
    """STEPS decode steps of one token, stacked on a leading axis."""
    steps = [make_step(1 + i, LENGTHS[:, None] + np.int32(i), np.ones((B, 1), bool)) for i in range(STEPS)]
    return jax.tree.map(lambda *x: jnp.stack(x), *steps)


def run_steps(cache, steps: Step):
    """Runs stacked steps over anything that has `.step`: outputs [STEPS, B, T, N, H] and the cache."""

    def one(cache, step):
        out, cache = cache.step(step)
        return cache, out

    cache, outputs = jax.lax.scan(one, cache, steps)
    return outputs, cache


_prefill = jax.jit(begin, compiler_options=FAST_COMPILE)
_decode = jax.jit(run_steps, compiler_options=FAST_COMPILE)


@functools.cache
def prefilled(spec: str, dtype: str = "float32"):
    """The prompt's output [B, T, N, H], and the cache after the prompt (one layer)."""
    cache = empty(spec, dtype=dtype)
    out, layer = _prefill(cache[0], prompt_step())
    return out, ModelCache((layer,), cache.prompt_lengths, cache.method)


def continued(cache: ModelCache):
    """The outputs of STEPS decode steps, and the cache after them; `cache` stays."""
    outputs, layer = _decode(cache[0], decode_steps())
    return outputs, ModelCache((layer,), cache.prompt_lengths, cache.method)


@functools.cache
def decoded(spec: str, dtype: str = "float32"):
    """`continued` after `prefilled`."""
    return continued(prefilled(spec, dtype)[1])


def assert_same_bits(got, want) -> None:
    """Equal structure (method, dimensions, phase) and equal bits in every leaf."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
