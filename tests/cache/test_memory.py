"""Bytes are those of the buffers, steps write in place, and one bucket compiles once (laws 6 and 7)."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.cache.codec import Identity
from kvjax.cache.head_split import empty_layer
from kvjax.cache.layer_cache import LayerCache, blank_data
from kvjax.cache.layout import CacheDims
from kvjax.cache.method import CacheMethod
from kvjax.cache.methods import parse
from kvjax.cache.model_cache import ModelCache
from kvjax.cache.plan import layer_bytes
from tests.cache.cases import METHODS
from tests.cache.driver import QUICK, Setup, step_of
from tests.thin import thinned

SMALL = CacheDims(2, 2, 4, 32, max_length=88, prompt_length=64, dtype="bfloat16", width=128)
LARGE = CacheDims(batch=1, kv_heads=2, query_heads=8, head_dim=64, max_length=8192, prompt_length=8000)

STORED = (
    "full",
    "int8",
    "kivi-2",
    "kivi_released",
    "actqkv",
    "top_values",
    "snapkv:share=50%+int4",
    "h2o:share=50%",
    "h2o:share=50%+kivi-2",
    "streaming_llm:share=50%,positions=renumbered",
)

# Buffers are assigned before LLVM sees the program; what it would optimise is time.
SAME_BUFFERS = {option: value for option, value in QUICK.items() if option == "xla_backend_optimization_level"}


def leaves_bytes(cache: LayerCache) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))


@pytest.mark.parametrize("dims", [SMALL, dataclasses.replace(SMALL, batch=3, window=24, dtype="float32")])
@pytest.mark.parametrize("name", METHODS)
def test_the_plan_is_what_is_allocated(name: str, dims: CacheDims) -> None:
    """Law 6: in every layer the declared bytes are the buffers' bytes."""
    method = METHODS[name]
    cache = jax.eval_shape(lambda: empty_layer(method, dims, data=blank_data(method, dims)))
    assert layer_bytes(method, dims) == leaves_bytes(cache)


def test_nbytes_is_the_sum_of_the_leaves() -> None:
    cache = ModelCache.init(parse("h2o:tokens=24+int4"), [SMALL, dataclasses.replace(SMALL, layer=1)])
    assert cache.nbytes == sum(leaf.nbytes for layer in cache for leaf in jax.tree.leaves(layer))
    assert cache.layer_bytes == cache.planned_bytes


def test_four_bits_take_a_quarter() -> None:
    """Codes are packed and nothing else of that size is kept; scales, zero points and positions are the rest."""
    dims = dataclasses.replace(LARGE, head_dim=128)
    full, four, two = (layer_bytes(parse(name), dims) for name in ("full", "kivi-4", "kivi-2"))
    # 4 + 32/32 and 2 + 32/32 bits of 16, with 160 exact tokens, and a position of 4 bytes per token and not per head
    assert 0.31 < four / full < 0.34 and 0.18 < two / full < 0.22


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1, compiler_options=SAME_BUFFERS)
def decode(setup: Setup, cache: LayerCache, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, LayerCache]:
    valid = jnp.ones((q.shape[0], q.shape[1]), bool)
    return cache.step(step_of(setup, (q, k, v), cache.length, valid))


def token_shapes(dims: CacheDims, tokens: int = 1) -> list[jax.ShapeDtypeStruct]:
    heads = (dims.query_heads, dims.kv_heads, dims.kv_heads)
    return [jax.ShapeDtypeStruct((dims.batch, tokens, n, dims.head_dim), jnp.bfloat16) for n in heads]


@functools.cache
def compiled_decode(name: str) -> tuple[int, jax.stages.CompiledMemoryStats, str]:
    """Bytes of the cache, memory analysis and HLO of the compiled step that decodes one token at 8,000."""
    method = parse(name)
    cache = jax.eval_shape(lambda: dataclasses.replace(LayerCache.init(method, LARGE), phase="decode"))
    compiled = decode.lower(Setup(method, LARGE), cache, *token_shapes(LARGE)).compile()
    return leaves_bytes(cache), compiled.memory_analysis(), compiled.as_text()


@pytest.mark.parametrize("name", thinned(STORED))
def test_a_decode_step_updates_the_cache_in_place(name: str) -> None:
    """Law 6: all of the donated cache is aliased to the output."""
    allocated, memory, _ = compiled_decode(name)
    assert memory.alias_size_in_bytes >= allocated


@pytest.mark.parametrize("name", thinned(STORED))
def test_temporaries_of_a_decode_step_are_bounded(name: str) -> None:
    """Law 6: never a dequantised, widened or copied cache.

    The bound is half of what the decoded keys and values of the coded slots take in float32, and three quarters of that
    for slots stored in bfloat16: XLA for CPUs copies a bfloat16 array to write into its bits.
    Logits, their exponentials and the blocks in work are far below it.
    """
    segments = jax.eval_shape(lambda: LayerCache.init(parse(name), LARGE)).segments
    _, memory, _ = compiled_decode(name)
    widened = sum(s.slots * (0.75 if s.key_codec == Identity() else 0.5) for s in segments)
    assert memory.temp_size_in_bytes < 2 * widened * LARGE.kv_heads * LARGE.head_dim * 4


@pytest.mark.parametrize("name", ["full", "kivi-2:residual=32", "h2o:tokens=32", "snapkv:tokens=32,window=8+int4"])
def test_one_bucket_compiles_once(name: str) -> None:
    """Law 7: other lengths of the same padded shapes, and every further token, reuse the compiled functions."""
    method, dims = parse(name), SMALL
    traces = {"prefill": 0, "decode": 0}
    arrays = [np.ones((dims.batch, 64, n, dims.head_dim), np.float32) for n in (4, 2, 2)]

    @functools.partial(jax.jit, compiler_options=QUICK)
    def first(lengths: jax.Array, *arrays: jax.Array) -> LayerCache:
        traces["prefill"] += 1
        cache = LayerCache.init(method, dims, lengths)
        valid = jnp.arange(64) < lengths[:, None]
        return cache.step(step_of(Setup(method, dims), arrays, cache.length, valid))[1]

    @functools.partial(jax.jit, donate_argnums=0, compiler_options=QUICK)
    def then(cache: LayerCache, *arrays: jax.Array) -> LayerCache:
        traces["decode"] += 1
        valid = jnp.ones((dims.batch, 1), bool)
        return cache.step(step_of(Setup(method, dims), arrays, cache.length, valid))[1]

    for lengths in ((64, 20), (33, 1)):
        cache = first(jnp.array(lengths, jnp.int32), *arrays)
        for _ in range(5):
            cache = then(cache, *(x[:, :1] for x in arrays))
        assert cache.length.tolist() == [n + 5 for n in lengths]
    assert traces == {"prefill": 1, "decode": 1}


def test_equal_methods_are_one_static_argument() -> None:
    """Methods and dimensions are values: hashable, equal when built twice."""
    for name, method in METHODS.items():
        again = dataclasses.replace(method)
        assert again == method and hash(again) == hash(method), name
    assert parse("h2o:tokens=24+int4") == METHODS["h2o:tokens=24+int4"]
    assert isinstance(parse("full"), CacheMethod)
