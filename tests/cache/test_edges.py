"""Where sizes meet: prompts of almost nothing, blocks that do not divide, and decoding far beyond the budget."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.cache.budget import Uniform
from kvjax.cache.layer_cache import LayerCache
from kvjax.cache.method import CacheMethod
from kvjax.cache.methods import parse
from kvjax.cache.policy import AttentionMass, Random
from tests.cache.cases import METHODS
from tests.cache.driver import Inputs, Setup, dims_of, draw, run, step_of
from tests.cache.holding import recent_of
from tests.thin import thinned

FAR = (
    "streaming_llm:tokens=24",
    "streaming_llm:tokens=24,positions=renumbered",
    "h2o:tokens=24",
    "h2o:tokens=40,recent=0.25+kivi-4:group=8",
    "streaming-prefill-h2o-blocks",
    "every-4",
    "every-16-blocks",
    "policy-random",
)


@functools.cache
def short() -> Inputs:
    """One-token prompts, and prompts just around 4 sinks, a window of 8 and a block of 16."""
    return draw(31, (1, 3, 17), padded=64, decoded=24, query_heads=8)


@pytest.mark.parametrize(("batch", "kv_heads"), [(1, 2), (3, 1)])
@pytest.mark.parametrize("name", thinned(["h2o:tokens=24+int4", "kivi-2:residual=32", "streaming-prefill-h2o"]))
def test_one_row_and_one_head(name: str, batch: int, kv_heads: int) -> None:
    """The first head of two, in a batch of three, is what it is alone."""
    wide = short()
    narrow = dataclasses.replace(
        wide.take(range(batch)),
        q=wide.q[:batch, :, : 4 * kv_heads],
        k=wide.k[:batch, :, :kv_heads],
        v=wide.v[:batch, :, :kv_heads],
    )
    ours = run(Setup(METHODS[name], dims_of(narrow)), narrow)
    theirs = run(Setup(METHODS[name], dims_of(wide)), wide)
    np.testing.assert_allclose(ours.outputs, theirs.outputs[:, :batch, : 4 * kv_heads], atol=1e-6, rtol=1e-6)
    for b in range(batch):
        assert ours.kept(24, b, 0) == theirs.kept(24, b, 0)


@pytest.mark.parametrize("padded", [13, 17, 40])
@pytest.mark.parametrize(
    "spec", thinned(["kivi-2:group=16,residual=16", "int4", "h2o:tokens=64,recent=0.25+kivi-4:group=16"])
)
def test_prompts_padded_to_odd_lengths(spec: str, padded: int) -> None:
    """The block of a codec need not divide the length that prompts are padded to."""
    inputs = draw(32, (padded, 5), padded=padded, decoded=20, query_heads=4)
    result = run(Setup(parse(spec), dims_of(inputs)), inputs)
    index = np.arange(48 + 20) % (padded + 20)
    wider = dataclasses.replace(inputs, padded=48, q=inputs.q[:, index], k=inputs.k[:, index], v=inputs.v[:, index])
    dims = dims_of(wider, prompt_length=padded, max_length=padded + 20)
    expected = run(Setup(parse(spec), dims), wider)
    np.testing.assert_allclose(result.outputs, expected.outputs, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", thinned(FAR))
def test_hundreds_of_tokens_beyond_the_budget(name: str) -> None:
    """The laws of positions hold at every one of 400 steps, and what is held stays within the budget."""
    method = METHODS[name]
    inputs = draw(33, (40, 2), padded=40, decoded=400, query_heads=4)
    result = run(Setup(method, dims_of(inputs), chunk=8), inputs)
    assert np.isfinite(result.outputs).all()
    held = np.sort(np.asarray(result.held), axis=-1)
    assert ((np.diff(held, axis=-1) > 0) | (held[..., 1:] == -1)).all()
    budget = method.budget.tokens(40)
    slack = 0 if method.every is None else method.every - method.block
    counts = (held >= 0).sum(-1)
    assert counts.max() <= budget + slack
    assert counts[-1].min() > budget - 2 * method.block
    recent = recent_of(method, 40, 40)
    for i in range(401):
        for b, prompt in enumerate((40, 2)):
            tokens = prompt + i
            always = [*range(min(method.sinks, tokens)), *range(max(0, tokens - recent), tokens)]
            for head in range(2):
                assert np.isin(always, held[i, b, head]).all()


def test_a_chunk_longer_than_the_body() -> None:
    """A question of 32 tokens into a cache of 12: what stays is what it would keep token by token."""
    inputs = draw(34, (40, 20), padded=40, decoded=32, query_heads=4)
    method = CacheMethod(budget=Uniform(tokens_kept=12), policy=Random(), sinks=2, recent=4, every=1)
    setup = Setup(method, dims_of(inputs))
    one_by_one = run(setup, inputs)
    lengths = jnp.array(inputs.lengths, jnp.int32)
    q, k, v = (np.moveaxis(x[:, :, 0], 0, 1) for x in inputs.later())

    @jax.jit
    def at_once(prompt: tuple, later: tuple) -> LayerCache:
        cache = LayerCache.init(method, setup.dims, lengths)
        valid = jnp.arange(40) < lengths[:, None]
        _, cache = cache.step(step_of(setup, prompt, cache.length, valid))
        return cache.step(step_of(setup, later, cache.length, jnp.ones((2, 32), bool)))[1]

    cache = at_once(inputs.prompt(), (q, k, v))
    for ours, theirs in zip(cache.segments, one_by_one.cache.segments, strict=True):
        np.testing.assert_array_equal(ours.positions, theirs.positions)


def test_rows_that_append_nothing_stay_as_they_are() -> None:
    """A chunk in which a row has no valid token leaves every buffer of that row bit for bit."""
    inputs = draw(35, (40, 20), padded=40, decoded=4, query_heads=4)
    method = CacheMethod(budget=Uniform(tokens_kept=16), policy=AttentionMass(), sinks=2, recent=4, every=1)
    setup = Setup(method, dims_of(inputs))
    before = run(setup, inputs).cache
    arrays = [np.full((2, 4, n, 32), np.nan, np.float32) for n in (4, 2, 2)]
    _, after = jax.jit(lambda cache: cache.step(step_of(setup, arrays, cache.length, jnp.zeros((2, 4), bool))))(before)
    for ours, theirs in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_seen_by_all_later_queries_normalises_the_mass() -> None:
    """With mean_over_queries a token's score is the mean over the queries that could see it, the current one included.

    With equal keys attention is uniform over what is held, so every query gives a token 1/held.
    """
    inputs = draw(36, (24,), padded=24, decoded=1, query_heads=2)
    uniform = dataclasses.replace(inputs, q=np.zeros_like(inputs.q))
    method = CacheMethod(
        budget=Uniform(tokens_kept=12), policy=AttentionMass(mean_over_queries=True), recent=1, every=1
    )
    result = run(Setup(method, dims_of(uniform)), uniform)
    # The mean over queries i >= j of 1/(i + 1) falls with j: the oldest tokens win.
    assert result.kept(0, 0, 0) == [*range(11), 23]
    # Token 23 has two queries, (1/24 + 1/13) / 2 = 0.059; token 10 has 15, (1/11 + ... + 1/24 + 1/13) / 15 = 0.062.
    assert result.kept(1, 0, 0) == [*range(11), 24]
