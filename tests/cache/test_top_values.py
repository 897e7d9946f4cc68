"""Reading all keys and few values (`TopValues`): the transcription, coded stores, what is refused, and memory."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.cache.budget import AdaptiveHeads, Uniform
from kvjax.cache.codec import Integer
from kvjax.cache.head_split import empty_layer
from kvjax.cache.layer_cache import LayerCache
from kvjax.cache.layout import CacheDims
from kvjax.cache.method import CacheMethod
from kvjax.cache.methods import parse
from kvjax.cache.plan import layer_bytes
from kvjax.cache.policy import Observation
from kvjax.cache.segment import Segment
from kvjax.cache.selector import TopValues
from kvjax.errors import UsageError
from tests.cache.calibrated import data_of
from tests.cache.driver import QUICK, THETA, Inputs, Setup, dims_of, draw, prefill, run, step_of
from tests.oracles.rotary import rotate_each
from tests.oracles.top_values import read_best, top_values

LENGTHS = (48, 33, 17, 1)


@functools.cache
def inputs_of(query_heads: int = 8) -> Inputs:
    return draw(3, LENGTHS, padded=48, decoded=8, query_heads=query_heads)


def everything(inputs: Inputs, b: int) -> list[list[list[int]]]:
    """What a cache that keeps all tokens holds before each decoded token."""
    return [[list(range(inputs.lengths[b] + i))] * 2 for i in range(inputs.decoded)]


@pytest.mark.parametrize("query_heads", [2, 8])
@pytest.mark.parametrize("renormalise", ["loaded", "all"])
def test_the_transcription(query_heads: int, renormalise: str) -> None:
    """Sinks, body, recent window and the token itself compete together."""
    inputs = inputs_of(query_heads)
    method = CacheMethod(selector=TopValues(6, renormalise), sinks=2, recent=8)
    setup = Setup(method, dims_of(inputs), softcap=20.0)
    result = run(setup, inputs)
    for b in range(len(LENGTHS)):
        trace = top_values(inputs.row(b, setup), everything(inputs, b), count=6, over_all=renormalise == "all")
        assert trace.gap > 1e-6
        np.testing.assert_allclose(result.outputs[:, b], np.stack(trace.outputs), atol=1e-5, rtol=0)
        np.testing.assert_allclose(result.prompt_output[b, : LENGTHS[b]], trace.prompt_output, atol=1e-5, rtol=0)


def test_it_reads_what_an_eviction_has_left_and_leaves_the_eviction_alone() -> None:
    """Attention is summed over the whole softmax, so the same tokens are kept as without a selector."""
    inputs = inputs_of()
    setup = Setup(parse("h2o:tokens=16+top_values:count=4"), dims_of(inputs))
    result, plain = run(setup, inputs), run(Setup(parse("h2o:tokens=16"), dims_of(inputs)), inputs)
    np.testing.assert_array_equal(result.held, plain.held)
    assert np.abs(result.outputs - plain.outputs).max() > 0.05
    for b in range(len(LENGTHS)):
        held = [[result.kept(i, b, head) for head in range(2)] for i in range(inputs.decoded)]
        trace = top_values(inputs.row(b, setup), held, count=4, over_all=False)
        assert trace.gap > 1e-6
        np.testing.assert_allclose(result.outputs[:, b], np.stack(trace.outputs), atol=1e-5, rtol=0)


def test_a_window_hides_slots_from_the_choice() -> None:
    inputs = inputs_of()
    method = CacheMethod(budget=Uniform(tokens_kept=40), selector=TopValues(3), recent=2, every=1)
    setup = Setup(method, dims_of(inputs, window=10))
    result = run(setup, inputs)
    for b in range(len(LENGTHS)):
        trace = top_values(inputs.row(b, setup), everything(inputs, b), count=3, over_all=False)
        np.testing.assert_allclose(result.outputs[:, b], np.stack(trace.outputs), atol=1e-5, rtol=0)


@pytest.mark.parametrize("renormalise", ["loaded", "all"])
def test_as_many_as_there_are_is_reading_all(renormalise: str) -> None:
    """As many as there are slots: the same program. As many as there are tokens: of the slots most are empty."""
    inputs = draw(4, (16, 5), padded=16, decoded=4, query_heads=8)
    dims = dims_of(inputs, max_length=64)
    plain = run(Setup(CacheMethod(sinks=2, recent=4), dims), inputs)
    for count, tolerance in ((65, 0.0), (20, 1e-6)):
        method = CacheMethod(selector=TopValues(count, renormalise), sinks=2, recent=4)
        np.testing.assert_allclose(run(Setup(method, dims), inputs).outputs, plain.outputs, atol=tolerance, rtol=0)


@pytest.mark.parametrize(("method", "chunk", "together"), [("exact", 48, 4), ("streaming", 1, 4)])
def test_several_tokens_and_prompts_read_everything(method: str, chunk: int, together: int) -> None:
    inputs = inputs_of()
    runs = [
        run(
            Setup(
                CacheMethod(prefill=method, recent=4, **selector),
                dims_of(inputs),
                chunk=chunk,
                together=together,
            ),
            inputs,
        )
        for selector in ({}, {"selector": TopValues(3)})
    ]
    np.testing.assert_array_equal(runs[0].outputs, runs[1].outputs)
    np.testing.assert_array_equal(runs[0].prompt_output, runs[1].prompt_output)


CODED = (
    "int8",
    "kivi-2:residual=32",
    "mikv:tokens=24",
    "streaming_llm:tokens=24,positions=renumbered",
    pytest.param("int4", marks=pytest.mark.slow),
    pytest.param("kvquant-3:outliers=0.05", marks=pytest.mark.slow),
    "cskv:window=16",
    pytest.param("turboquant-3", marks=pytest.mark.slow),
    pytest.param("think:window=8,recent=8", marks=pytest.mark.slow),
    pytest.param("fp8", marks=pytest.mark.slow),
    pytest.param("kivi_released:residual=16,group=8", marks=pytest.mark.slow),
    "razor:local=12",
)


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def _filled(setup: Setup, prompt: tuple, lengths: jax.Array) -> LayerCache:
    cache = empty_layer(setup.method, setup.dims, lengths, data_of(setup.method, setup.dims))
    assert isinstance(cache, LayerCache)
    return prefill(setup, cache, prompt, lengths)[1]


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def _step(setup: Setup, cache: LayerCache, arrays: tuple) -> jax.Array:
    return cache.step(step_of(setup, arrays, cache.length, jnp.ones(arrays[0].shape[:2], bool)))[0]


def slots_of(cache: LayerCache, segment: Segment, b: int, head: int) -> tuple[np.ndarray, ...]:
    """Keys [n, H], rotated, values [n, H], positions [n] and what is added to the logits [n] of the slots in use."""
    heads = cache.dims.kv_heads
    keys, values = (
        np.broadcast_to(x, (x.shape[0], heads, *x.shape[2:]))[b, head].astype(np.float64)
        for x in (segment.decoded_keys, segment.decoded_values)
    )
    positions = np.broadcast_to(segment.positions, (len(segment.positions), heads, segment.slots))[b, head]
    bias = (
        np.zeros(segment.slots)
        if segment.bias is None
        else np.asarray(segment.bias)[b, min(head, segment.bias.shape[1] - 1)]
    )
    used = positions >= 0
    return keys[used], values[used], positions[used], bias[used]


@pytest.mark.parametrize("spec", CODED)
def test_coded_stores(spec: str) -> None:
    """One token over what the stores decode to, recomputed in NumPy."""
    inputs, count = inputs_of(), 5
    method = parse(f"{spec}+top_values:count={count}")
    setup = Setup(method, dims_of(inputs))
    lengths = jnp.asarray(inputs.lengths, jnp.int32)
    cache = _filled(setup, inputs.prompt(), lengths)
    arrays = tuple(x[0] for x in inputs.later())
    output = np.asarray(_step(setup, cache, arrays))[:, 0]
    q, k, v = (np.asarray(x[:, 0], np.float64) for x in arrays)
    for b, length in enumerate(inputs.lengths):
        for head in range(2):
            keys, values, positions, bias = (
                np.concatenate(parts)
                for parts in zip(*(slots_of(cache, s, b, head) for s in cache.segments), strict=True)
            )
            own = length
            if method.positions == "renumbered":
                ranks = np.argsort(np.argsort(positions))
                keys, own = rotate_each(keys, ranks, THETA), len(ranks)
            elif method.stores_unrotated:
                keys = rotate_each(keys, positions, THETA)
            keys = np.concatenate([keys, rotate_each(k[b, head][None], np.array([own]), THETA)])
            values, bias = np.concatenate([values, v[b, head][None]]), np.append(bias, 0.0)
            queries = rotate_each(q[b], np.full(8, own), THETA)
            for n in range(4 * head, 4 * head + 4):
                expected, gap = read_best(keys @ queries[n] / np.sqrt(32) + bias, values, count, over_all=False)
                assert gap > 1e-6
                np.testing.assert_allclose(output[b, n], expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"budget": AdaptiveHeads(tokens_kept=24), "policy": Observation(window=8), "recent": 8}, "packed pool"),
        ({"values": Integer(bits=4, axis="channel", group=16)}, "16 of them as one block"),
    ],
)
def test_what_cannot_be_read_by_itself_is_refused(changes: dict, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        CacheMethod(selector=TopValues(8), **changes)


@pytest.mark.parametrize(("kind", "reason"), [("latent", "of which the keys are made"), ("selective", "one by one")])
def test_attention_that_it_does_not_go_with_is_refused(kind: str, reason: str) -> None:
    dims = CacheDims(1, 1, 4, 16, 64, 32, **{kind: True})
    with pytest.raises(UsageError, match=reason):
        CacheMethod(selector=TopValues(8)).check(dims)


def test_options_and_composition() -> None:
    with pytest.raises(UsageError, match="at least one"):
        TopValues(0)
    with pytest.raises(UsageError, match="renormalise"):
        parse("top_values:renormalise=some")
    method = parse("h2o:tokens=64+top_values:count=7,renormalise=all")
    assert method.selector == TopValues(7, "all") and method.every == 1
    with pytest.raises(UsageError, match="one selector"):
        parse("quest+top_values")


@pytest.mark.parametrize("stored", ["full", "int4"])
def test_nothing_of_full_size_is_made(stored: str) -> None:
    """A decode step at 8,192 slots: beside the logits, less than an eighth of the values in float32."""
    dims = CacheDims(batch=1, kv_heads=2, query_heads=4, head_dim=128, max_length=8192, prompt_length=8000)
    method = parse(f"{stored}+top_values:count=32")
    assert layer_bytes(method, dims) == layer_bytes(parse(stored), dims), "no index"
    cache = jax.eval_shape(lambda: LayerCache.init(method, dims).in_phase("decode"))
    token = [jax.ShapeDtypeStruct((1, 1, n, 128), jnp.bfloat16) for n in (4, 2, 2)]
    step = functools.partial(_step.__wrapped__, Setup(method, dims))
    memory = jax.jit(step).lower(cache, tuple(token)).compile().memory_analysis()
    logits = 4 * 4 * 8192
    assert memory.temp_size_in_bytes < 4 * logits + 4 * 2 * 8192 * 128 / 8
