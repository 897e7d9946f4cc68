"""Policies that score a prompt by itself, and those that score keys: the same kept sets and outputs as in NumPy."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.cache.budget import Uniform
from kvjax.cache.layer_cache import LayerCache
from kvjax.cache.method import CacheMethod
from kvjax.cache.methods import parse
from kvjax.cache.plan import resolve
from kvjax.cache.policy import Chunks, ExpectedAttention, Given, KeyDiff, KeyNorm
from kvjax.cache.prompt import attend_prompt
from kvjax.errors import UsageError
from tests.cache.calibrated import data_of
from tests.cache.driver import QUICK, Inputs, Setup, dims_of, draw, held, output_projection, run, step_of
from tests.cache.faithful import GROUPED, check, inputs_of
from tests.oracles.attention import contiguous
from tests.oracles.chunkkv import chunkkv_scores
from tests.oracles.criticalkv import criticalkv_kept, projected_norms
from tests.oracles.expected_attention import expected_attention_scores, query_statistics
from tests.oracles.key_scores import keydiff_scores, knorm_scores, lagkv_scores
from tests.oracles.kvzip import kvzap_scores
from tests.oracles.online import online
from tests.oracles.pyramidkv import pyramid_budgets
from tests.oracles.row import Row, Trace
from tests.oracles.scored import scored
from tests.oracles.snapkv import snapkv, window_scores


def beginning(row: Row, tokens: int) -> Row:
    """The first tokens of a row, all of them prompt."""
    return dataclasses.replace(row, q=row.q[:tokens], k=row.k[:tokens], v=row.v[:tokens], prompt=tokens)


def before_window(row: Row, window: int, kernel: int) -> np.ndarray:
    """SnapKV's scores [K, P], 0 in the window."""
    if row.prompt <= window:
        return np.zeros((row.kv_heads, row.prompt))
    scores = np.stack([window_scores(p, window, kernel) for p in row.attention(row.prompt)[1]])
    return np.pad(scores, ((0, 0), (0, window)))


@pytest.mark.parametrize(("name", "of_keys"), [("knorm", knorm_scores), ("keydiff", keydiff_scores)])
@GROUPED
def test_scores_of_keys_at_the_end_of_the_prompt(name: str, of_keys, query_heads: int) -> None:
    inputs = inputs_of(query_heads)
    method = dataclasses.replace(parse(f"{name}:tokens=24,sinks=2,recent=4"), every=None)
    check(Setup(method, dims_of(inputs)), inputs, lambda row: scored(row, of_keys(row), sinks=2, recent=4, places=18))


@pytest.mark.parametrize(("name", "of_keys"), [("knorm", knorm_scores), ("keydiff", keydiff_scores)])
def test_scores_of_keys_while_decoding(name: str, of_keys) -> None:
    """KeyDiff's mean direction is that of all keys so far, evicted ones included."""
    inputs = inputs_of(8, seed=1)

    def transcribe(row: Row) -> Trace:
        return online(row, lambda seen: of_keys(beginning(row, seen)), sinks=0, recent=1, places=23)

    check(Setup(parse(f"{name}:tokens=24"), dims_of(inputs)), inputs, transcribe)


@pytest.mark.parametrize("changes", [{"positions": "renumbered"}, {"rotate": "read"}], ids=["renumbered", "on read"])
def test_keys_are_scored_rotated_however_they_are_stored(changes: dict) -> None:
    inputs = inputs_of(2)
    method = CacheMethod(budget=Uniform(tokens_kept=24), policy=KeyDiff(), sinks=2, recent=4, every=1, **changes)
    setup = Setup(method, dims_of(inputs))
    result = run(setup, inputs)
    for b in range(4):
        row = inputs.row(b, setup)

        def scores(seen: int, row: Row = row) -> np.ndarray:
            return keydiff_scores(beginning(row, seen))

        for i, kept in enumerate(online(row, scores, sinks=2, recent=4, places=18).kept):
            assert [result.kept(i, b, h) for h in range(2)] == kept


@GROUPED
def test_lagkv(query_heads: int) -> None:
    """Lengths and places at which the cut does not fall between equal ranks of two stretches."""
    inputs = draw(0, (64, 48, 44, 30), padded=64, decoded=8, query_heads=query_heads)
    setup = Setup(parse("lagkv:tokens=28,lag=8"), dims_of(inputs))

    def transcribe(row: Row) -> Trace:
        scores = lagkv_scores(row, sinks=4, lag=8, ddof=1, ranked=True)
        return scored(row, scores, sinks=4, recent=8, places=16)

    result = run(setup, inputs)
    for b in range(4):
        expected = transcribe(inputs.row(b, setup)).kept
        for i, kept in enumerate(expected):
            assert [result.kept(i, b, h) for h in range(2)] == kept


def test_lagkv_without_two_whole_stretches_keeps_the_newest() -> None:
    inputs = inputs_of(2)
    setup = Setup(parse("lagkv:tokens=24,lag=32,recent=4"), dims_of(inputs))
    check(
        setup,
        inputs,
        lambda row: scored(row, lagkv_scores(row, sinks=4, lag=32, ddof=1, ranked=True), sinks=4, recent=4, places=16),
    )


@GROUPED
@pytest.mark.parametrize("together", [True, False], ids=["layer", "head"])
def test_chunkkv(query_heads: int, together: bool) -> None:
    inputs = inputs_of(query_heads)
    setup = Setup(parse(f"chunkkv:tokens=24,window=8,size=4,together={str(together).lower()}"), dims_of(inputs))

    def transcribe(row: Row) -> Trace:
        scores = chunkkv_scores(before_window(row, 8, 5), chunk=4, shared=together)
        scores = np.broadcast_to(scores, (row.kv_heads, row.prompt))
        # Of equal scores within a chunk the first wins: what the budget cuts off a chunk is its end.
        return scored(row, scores - 1e-9 * np.arange(row.prompt), sinks=0, recent=8, places=16)

    result = run(setup, inputs)
    for b in range(4):
        for i, kept in enumerate(transcribe(inputs.row(b, setup)).kept):
            assert [result.kept(i, b, h) for h in range(2)] == kept


def test_chunks_of_any_policy_are_whole() -> None:
    """Beside sinks and window whole chunks are kept, counted from the start of the text."""
    inputs = inputs_of(2)
    method = CacheMethod(budget=Uniform(tokens_kept=24), policy=Chunks(KeyNorm(), size=4), sinks=4, recent=4)
    result = run(Setup(method, dims_of(inputs)), inputs)
    for head in range(2):
        chunks = {p // 4 for p in result.kept(0, 0, head)}
        assert result.kept(0, 0, head) == [p for p in range(64) if p // 4 in chunks] and len(chunks) == 6


@GROUPED
def test_criticalkv(query_heads: int) -> None:
    inputs = inputs_of(query_heads)
    setup = Setup(parse("criticalkv:tokens=24,window=8"), dims_of(inputs))
    projection = output_projection(query_heads, 32, 128).astype(np.float64)

    def transcribe(row: Row) -> Trace:
        if row.prompt <= 24:
            return scored(row, np.zeros((2, row.prompt)), sinks=0, recent=8, places=16)
        before = row.prompt - 8
        norms = projected_norms(row.v[:before], projection, contiguous(query_heads, 2))
        scores = before_window(row, 8, 5)[:, :before]
        kept, gap = criticalkv_kept(scores, norms, capacity=16, first=0.5, epsilon=1e-4)
        assert gap > 1e-6
        chosen = np.array([[float(p in positions) for p in range(row.prompt)] for positions in kept])
        return scored(row, chosen, sinks=0, recent=8, places=16)

    check(setup, inputs, transcribe)


def test_criticalkv_needs_an_output_projection() -> None:
    inputs = inputs_of(2)
    setup = Setup(parse("criticalkv:tokens=24,window=8"), dims_of(inputs))
    arrays, lengths = [jnp.asarray(x) for x in inputs.prompt()], jnp.asarray(inputs.lengths)
    step = step_of(setup, arrays, jnp.zeros(4, jnp.int32), jnp.arange(64) < lengths[:, None])
    cache = LayerCache.init(setup.method, setup.dims)
    with pytest.raises(UsageError, match="output projection"):
        jax.eval_shape(LayerCache.step, cache, dataclasses.replace(step, output_projection=None))


def _expected(inputs: Inputs, policy: ExpectedAttention, covariance: bool = True) -> None:
    method = CacheMethod(budget=Uniform(tokens_kept=24), policy=policy, sinks=4, recent=2)

    def transcribe(row: Row) -> Trace:
        scores = np.zeros((2, row.prompt))
        if row.prompt > 24:
            mean, spread = query_statistics(row, skip=4)
            scores = expected_attention_scores(
                row,
                mean,
                spread if covariance else None,
                sinks=4,
                future=policy.ahead,
                epsilon=policy.epsilon,
                value_norm=True,
                sink_bonus=1.0,
            )
        return scored(row, scores, sinks=4, recent=2, places=18)

    check(Setup(method, dims_of(inputs)), inputs, transcribe)


@GROUPED
def test_expected_attention(query_heads: int) -> None:
    _expected(inputs_of(query_heads), ExpectedAttention(ahead=40))


def test_expected_attention_with_epsilon_and_without_covariance() -> None:
    _expected(inputs_of(8, seed=2), ExpectedAttention(ahead=512, epsilon=1e-2, covariance=False), covariance=False)


def test_expected_attention_without_sinks_of_the_method() -> None:
    """The policy's own sinks win places where the method has none."""
    inputs = inputs_of(2)
    method = CacheMethod(budget=Uniform(tokens_kept=24), policy=ExpectedAttention(ahead=40), recent=2)
    result = run(Setup(method, dims_of(inputs)), inputs)
    assert all(result.kept(0, b, h)[:4] == [0, 1, 2, 3] for b in range(3) for h in range(2))


@GROUPED
@pytest.mark.parametrize("hidden", [0, 16], ids=["linear", "mlp"])
def test_kvzap_with_a_budget(query_heads: int, hidden: int) -> None:
    inputs = inputs_of(query_heads)
    setup = Setup(parse(f"kvzap:tokens=24,recent=8,sinks=2,hidden={hidden}"), dims_of(inputs))
    data = {name: np.asarray(x[0], np.float64) for name, x in data_of(setup.method, setup.dims).policy.items()}
    layers = [(data["kernel"].T, data["bias"])]
    if hidden:
        layers.insert(0, (data["hidden_kernel"][0], data["hidden_bias"][0]))

    def transcribe(row: Row) -> Trace:
        scores = kvzap_scores(np.concatenate([x.reshape(row.tokens, -1) for x in (row.k, row.v)], axis=-1), layers)
        return online(row, lambda seen: scores[:, :seen], sinks=2, recent=8, places=14)

    check(setup, inputs, transcribe)


def test_scores_that_come_with_the_prompt() -> None:
    """KVzip's: whatever a pass of its own has found."""
    inputs = inputs_of(2)
    setup = Setup(CacheMethod(budget=Uniform(tokens_kept=24), policy=Given(), sinks=1, recent=4), dims_of(inputs))
    lengths = jnp.asarray(inputs.lengths)
    step = step_of(setup, [jnp.asarray(x) for x in inputs.prompt()], lengths * 0, jnp.arange(64) < lengths[:, None])
    scores = np.random.default_rng(3).standard_normal((4, 2, 64))
    empty = LayerCache.init(setup.method, setup.dims, lengths)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def absorb(cache: LayerCache, scores: jax.Array) -> LayerCache:
        return cache.absorb_prompt(step, attend_prompt(step)[1], scores=scores)

    cache = absorb(empty, jnp.asarray(scores, jnp.float32))
    kept = np.asarray(held(cache))
    for b, length in enumerate(inputs.lengths):
        expected = scored(inputs.row(b, setup), scores[b, :, :length], sinks=1, recent=4, places=19).kept[0]
        assert [sorted(p for p in head if p >= 0) for head in kept[b].tolist()] == expected
    with pytest.raises(UsageError, match="pass of their own"):
        jax.eval_shape(LayerCache.step, empty, step)


@pytest.mark.parametrize("layers", [1, 2, 5])
def test_pyramidkv_budgets_fall_linearly_and_lose_nothing(layers: int) -> None:
    method = parse("pyramidkv:tokens=100,window=8")
    inputs = draw(0, (512,), padded=512, decoded=8, query_heads=2)
    kept = []
    for layer in range(layers):
        dims = dims_of(inputs, layer=layer, layers=layers)
        kept.append(method.for_layer(dims).budget.tokens(512))
    exact = pyramid_budgets(layers=layers, prompt=512, capacity=100, window=8, beta=20)
    np.testing.assert_allclose(kept, exact, atol=1)
    assert sum(kept) == 100 * layers
    assert all(a >= b for a, b in itertools.pairwise(kept))


def test_pyramidkv_in_bytes_fills_them_with_the_pyramid() -> None:
    """A budget in bytes over all layers."""
    inputs = draw(0, (64,), padded=64, decoded=8, query_heads=2)
    layers = [dims_of(inputs, layer=layer, layers=4) for layer in range(4)]
    method = resolve(parse("pyramidkv:bytes=100000,window=8"), layers)
    kept = [method.for_layer(dims).budget.tokens(64) for dims in layers]
    assert kept[0] > kept[-1] and sum(kept) == 4 * method.budget.tokens(64)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_pyramidkv_is_snapkv_with_another_budget(layer: int) -> None:
    inputs = inputs_of(8)
    setup = Setup(parse("pyramidkv:tokens=24,window=8"), dims_of(inputs, layer=layer, layers=3))
    capacity = setup.method.for_layer(setup.dims).budget.tokens(64)
    assert capacity == {0: 39, 1: 24, 2: 9}[layer]
    check(setup, inputs, lambda row: snapkv(row, capacity=capacity, window=8, kernel=5))
