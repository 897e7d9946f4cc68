"""Methods that treat layers or heads differently, or keep something of what they evict, equal their transcriptions."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from kvjax.cache import methods
from kvjax.cache.budget import AdaptiveHeads, Full, HeadTable, Uniform
from kvjax.cache.codec import Balanced, Integer
from kvjax.cache.fate import Compensate, Demote, Represent
from kvjax.cache.head_split import HeadSplit
from kvjax.cache.method import CacheMethod
from kvjax.cache.policy import AttentionMass, Random, Recency
from kvjax.cache.policy.random import hash_uniform
from tests.cache.driver import Inputs, Setup, dims_of, draw, run
from tests.cache.faithful import GROUPED
from tests.oracles.adakv import adakv_kept
from tests.oracles.duoattention import duo
from tests.oracles.kvcrush import anchor, kvcrush_kept, signatures
from tests.oracles.mikv import mikv
from tests.oracles.quest import quest
from tests.oracles.razorattention import razor

TOLERANCE = 1e-5


def inputs_of(query_heads: int, seed: int = 0) -> Inputs:
    return draw(seed, (64, 45, 17, 1), padded=64, decoded=24, query_heads=query_heads)


def random_scores(method: CacheMethod, inputs: Inputs) -> np.ndarray:
    """[K, T] of the policy `Random`: the same for every row."""
    positions = np.arange(inputs.padded, dtype=np.int32)[None, None]
    return np.asarray(hash_uniform(method.policy.seed, np.arange(2, dtype=np.int32), positions))[0].astype(np.float64)


@pytest.mark.parametrize("floor", [0.0, 0.2, 1.0])
def test_adaptive_heads_share_their_places(floor: float) -> None:
    inputs = inputs_of(4)
    budget = AdaptiveHeads(tokens_kept=24, floor=floor)
    method = CacheMethod(budget=budget, policy=Random(seed=5), sinks=2, recent=4)
    result = run(Setup(method, dims_of(inputs)), inputs)
    scores = random_scores(method, inputs)
    for b, length in enumerate(inputs.lengths):
        middle = range(min(2, length), max(length - 4, min(2, length)))
        always = [p for p in range(length) if p not in middle]
        chosen, _ = adakv_kept(scores[:, list(middle)], capacity=min(18, len(middle)), safeguard=floor)
        for head in range(2):
            expected = sorted([*always, *(middle[i] for i in chosen[head])])
            assert result.kept(0, b, head) == expected
            assert result.kept(24, b, head) == [*expected, *range(length, length + 24)]
    sizes = {len(result.kept(0, 0, head)) for head in range(2)}
    assert (len(sizes) == 1) == (floor == 1.0), "heads keep different numbers unless each has its own budget"


@GROUPED
def test_razor(query_heads: int) -> None:
    inputs = inputs_of(query_heads)
    setup = Setup(methods.razor(local=12, sinks=4, table=((1, 0),)), dims_of(inputs))
    result = run(setup, inputs)
    assert isinstance(result.cache, HeadSplit)
    for b, length in enumerate(inputs.lengths):
        row = inputs.row(b, setup)
        trace = razor(row, [False, True], sinks=4, local=12, weighted=True, slides=True, leaves="after")
        for i, kept in enumerate(trace.kept):
            assert [result.kept(i, b, head) for head in range(2)] == kept, f"after token {i}"
        np.testing.assert_allclose(result.outputs[:, b], np.stack(trace.outputs), atol=TOLERANCE, rtol=0)
        local = result.cache.parts[0].aside if result.cache.heads[0] == (0,) else result.cache.parts[1].aside
        assert float(local.weight[b, 0, 0]) == trace.counts[-1][0] == max(0, length + 24 - 16)


@GROUPED
def test_duo_attention(query_heads: int) -> None:
    inputs = inputs_of(query_heads)
    setup = Setup(methods.duo_attention(recent=12, sinks=4, table=((0, 1),)), dims_of(inputs))
    result = run(setup, inputs)
    for b in range(len(inputs.lengths)):
        trace = duo(inputs.row(b, setup), [True, False], sinks=4, recent=12, chunk=None, leaves="after")
        for i, kept in enumerate(trace.kept):
            assert [result.kept(i, b, head) for head in range(2)] == kept, f"after token {i}"
        np.testing.assert_allclose(result.outputs[:, b], np.stack(trace.outputs), atol=TOLERANCE, rtol=0)


@GROUPED
@pytest.mark.parametrize("balanced", [True, False])
def test_mikv(query_heads: int, balanced: bool) -> None:
    inputs = inputs_of(query_heads)
    codec = Integer(bits=4, group=0.5)
    fate = Demote(keys=Balanced(codec) if balanced else codec, values=codec)
    method = CacheMethod(budget=Uniform(tokens_kept=24), policy=AttentionMass(), fate=fate, recent=0.5, every=1)
    setup = Setup(method, dims_of(inputs))
    result = run(setup, inputs)
    for b in range(len(inputs.lengths)):
        row = inputs.row(b, setup)
        trace = mikv(
            row, places=lambda tokens: 24, recent=12, low_bits=4, high_bits=None, balanced=balanced, floor=1e-6
        )
        assert trace.gap > 1e-6
        low = result.cache.aside
        for i in range(len(trace.kept)):
            everything = list(range(inputs.lengths[b] + i))
            assert [result.kept(i, b, head) for head in range(2)] == [everything] * 2
        for head in range(2):
            held = sorted(int(p) for p in np.asarray(low.positions[b, head]) if p >= 0)
            assert held == [p for p in range(row.tokens) if p not in trace.kept[-1][head]]
        np.testing.assert_allclose(result.outputs[:, b], np.stack(trace.outputs), atol=2e-3, rtol=0)


@pytest.mark.parametrize("mode", ["alternating", "mean", "zeros", "ones"])
def test_kvcrush(mode: str) -> None:
    inputs = inputs_of(4)
    fate = Represent(share=0.25, anchor=mode)
    method = CacheMethod(budget=Uniform(tokens_kept=24), policy=Random(seed=5), fate=fate, sinks=2, recent=6)
    result = run(Setup(method, dims_of(inputs)), inputs)
    scores = random_scores(method, inputs)
    for b, length in enumerate(inputs.lengths):
        middle = list(range(min(2, length), max(length - 6, min(2, length))))
        always = [p for p in range(length) if p not in middle]
        places = min(16, len(middle))
        mine = scores[:, middle]
        bits = signatures(mine, places)
        reference = anchor(mode, bits, draws=None, first=0)
        few = places // 4
        chosen, _ = kvcrush_kept(mine, bits, reference, important=places - few, representatives=few, pick="stride open")
        for head in range(2):
            assert result.kept(0, b, head) == sorted([*always, *(middle[i] for i in chosen[head])])


@GROUPED
def test_quest(query_heads: int) -> None:
    """Pages of the body and the token itself, which is exact and always read, as the transcription's last page is."""
    inputs = draw(3, (64, 48), padded=64, decoded=8, query_heads=query_heads)
    setup = Setup(methods.quest(tokens=24, page=8), dims_of(inputs))
    result = run(setup, inputs)
    for b, length in enumerate(inputs.lengths):
        assert length % 8 == 0
        trace = quest(inputs.row(b, setup), page=8, places=3, choice="max", last_counts=True)
        assert trace.gap > 1e-6
        # The transcription reads the page that the token itself begins or goes on with; here it is read besides.
        for i in range(1, 8):
            np.testing.assert_allclose(result.outputs[i, b], trace.outputs[i], atol=TOLERANCE, rtol=0)


def test_nothing_is_lost_by_demoting_to_full_precision() -> None:
    """The fate of a loser that keeps all of it is no eviction at all."""
    inputs = inputs_of(4)
    dims = dims_of(inputs)
    fate = Demote(keys=Integer(bits=8, group=2), values=Integer(bits=8, group=2))
    method = CacheMethod(budget=Uniform(tokens_kept=24), policy=AttentionMass(), fate=fate, recent=8, every=1)
    demoted = run(Setup(method, dims), inputs)
    whole = run(Setup(methods.full(), dims), inputs)
    np.testing.assert_allclose(demoted.outputs, whole.outputs, atol=0.02)


def test_a_table_of_full_heads_is_the_full_cache() -> None:
    inputs = inputs_of(4)
    dims = dims_of(inputs)
    method = CacheMethod(budget=HeadTable(budgets=(Full(), Full()), table=((0, 1),)), policy=Recency())
    split = run(Setup(method, dims), inputs)
    whole = run(Setup(methods.full(), dims), inputs)
    np.testing.assert_allclose(split.outputs, whole.outputs, atol=1e-6)
    assert dataclasses.replace(method, fate=Compensate()).fate.needs_rotated
