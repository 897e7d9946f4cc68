"""What holds for every method: the uncached pass, rows by themselves, positions and capacity (laws 1, 2, 4, 5)."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
from typing import Any

import numpy as np
import pytest

from kvjax.cache.budget import Full, Uniform
from kvjax.cache.method import CacheMethod
from kvjax.cache.methods import METHODS as NAMES
from kvjax.cache.policy import AttentionMass, Observation, Recency
from tests.cache.cases import (
    EVICTING,
    METHODS,
    NAMED,
    PARTS,
    covered,
    exported,
    most,
)
from tests.cache.driver import Inputs, Run, Setup, dims_of, draw, run
from tests.cache.holding import always_of, budget_of, by_head, recent_of, roomy
from tests.thin import thinned

LENGTHS = (64, 45, 17, 1)
TOLERANCE = 1e-5


@functools.cache
def inputs_of(query_heads: int = 8, junk: float = 3.0) -> Inputs:
    inputs = draw(11, LENGTHS, padded=64, decoded=24, query_heads=query_heads)
    return dataclasses.replace(inputs, junk=junk)


@functools.cache
def result_of(name: str) -> Run:
    """One run of every method that several laws look at."""
    return run(Setup(METHODS[name], dims_of(inputs_of())), inputs_of())


@functools.cache
def uncached(
    b: int, query_heads: int, window: int | None, softcap: float | None, reads: tuple[int, ...] | None
) -> np.ndarray:
    inputs = inputs_of(query_heads)
    setup = Setup(CacheMethod(), dims_of(inputs, window=window), softcap=softcap, reads=reads)
    row = inputs.row(b, setup)
    return row.attention(row.tokens)[0]


def assert_uncached(setup: Setup, query_heads: int = 8) -> Run:
    inputs = inputs_of(query_heads)
    result = run(setup, inputs)
    for b, prompt in enumerate(LENGTHS):
        expected = uncached(b, query_heads, setup.dims.window, setup.softcap, setup.reads)
        np.testing.assert_allclose(result.prompt_output[b, :prompt], expected[:prompt], atol=TOLERANCE, rtol=0)
        np.testing.assert_allclose(result.outputs[:, b], expected[prompt:], atol=TOLERANCE, rtol=0)
    return result


def assert_close(a: Run, b: Run, row_a: int, row_b: int, prompt: int) -> None:
    """Outputs within 1e-6 and the same tokens kept, in one row of each run."""
    np.testing.assert_allclose(a.prompt_output[row_a, :prompt], b.prompt_output[row_b, :prompt], atol=1e-6, rtol=1e-6)
    np.testing.assert_allclose(a.outputs[:, row_a], b.outputs[:, row_b], atol=1e-6, rtol=1e-6)
    for x, y in zip(sorted_positions(a, row_a), sorted_positions(b, row_b), strict=True):
        assert x == y


def sorted_positions(result: Run, row: int) -> list[list[list[int]]]:
    """After the prompt and every token, per head: the positions held."""
    held = np.asarray(result.held[:, row])
    return [[sorted(p for p in head.tolist() if p >= 0) for head in moment] for moment in held]


def test_every_exported_part_and_name_is_covered() -> None:
    for module, base, samples in PARTS:
        assert exported(module, base) == covered(samples)
    anywhere = {name for name in NAMES if not NAMES[name]().policy.needs_hiding}
    assert {spec.partition(":")[0] for spec in NAMED} == anywhere


def _roomy_methods() -> list[Any]:
    """Distinct ways to keep everything exactly; but for one of each policy and fate they are slow tests."""
    kept = {dataclasses.replace(roomy(method, 88), name="roomy") for method in METHODS.values()}
    seen, cases = set(), []
    for method in sorted(kept, key=repr):
        kind = (type(method.policy), type(method.fate), method.prefill)
        slow = [pytest.mark.slow] if kind in seen else []
        cases.append(pytest.param(method, marks=slow, id=f"{type(method.policy).__name__}-{len(cases)}"))
        seen.add(kind)
    return cases


@pytest.mark.parametrize("method", _roomy_methods())
def test_keeping_everything_is_the_uncached_pass(method: CacheMethod) -> None:
    """Law 1, and law 5: a budget that holds everything is a full one."""
    result = assert_uncached(Setup(method, dims_of(inputs_of()), chunk=16))
    for b, prompt in enumerate(LENGTHS):
        everything = [[list(range(prompt + i))] * 2 for i in range(25)]
        assert sorted_positions(result, b) == everything


STREAMED = {
    "full": CacheMethod(prefill="streaming"),
    "full-sinks-recent": CacheMethod(prefill="streaming", sinks=3, recent=8),
    "renumbered": CacheMethod(prefill="streaming", positions="renumbered", recent=8),
    "mass": CacheMethod(
        prefill="streaming", budget=Uniform(tokens_kept=88), policy=AttentionMass(), recent=8, sinks=1, every=2
    ),
}


@pytest.mark.parametrize(
    ("name", "chunk"),
    [("full", 7), ("full", 64), ("full-sinks-recent", 1), ("renumbered", 7), ("mass", 7), ("mass", 1)],
)
def test_streaming_prefill_of_any_chunk_is_the_uncached_pass(name: str, chunk: int) -> None:
    assert_uncached(Setup(STREAMED[name], dims_of(inputs_of()), chunk=chunk))


@pytest.mark.parametrize("name", ["full-sinks-recent", "renumbered", "mass"])
def test_questions_of_several_tokens_are_the_uncached_pass(name: str) -> None:
    """Steps of eight tokens after the prompt."""
    method = dataclasses.replace(STREAMED[name], prefill="exact")
    assert_uncached(Setup(method, dims_of(inputs_of()), together=8))


@pytest.mark.parametrize("query_heads", [2, 4])
def test_one_and_many_query_heads_per_kv_head(query_heads: int) -> None:
    inputs = inputs_of(query_heads)
    assert_uncached(Setup(CacheMethod(sinks=2, recent=8), dims_of(inputs)), query_heads)


@pytest.mark.parametrize("reads", [(1, 0, 1, 0, 0, 1, 0, 1), (0, 1, 1, 1, 0, 1, 1, 1)], ids=["interleaved", "unequal"])
@pytest.mark.parametrize("prefill", ["exact", "streaming"])
def test_query_heads_read_any_kv_head(reads: tuple[int, ...], prefill: str) -> None:
    method = CacheMethod(sinks=2, recent=8, prefill=prefill)
    assert_uncached(Setup(method, dims_of(inputs_of()), chunk=16, reads=reads))


@pytest.mark.parametrize("prefill", ["exact", "streaming"])
def test_soft_capped_logits(prefill: str) -> None:
    assert_uncached(Setup(CacheMethod(sinks=2, prefill=prefill), dims_of(inputs_of()), chunk=16, softcap=3.0))


WINDOWED = {
    "full": CacheMethod(),
    "full-sinks": CacheMethod(sinks=4, recent=8),
    "streaming": CacheMethod(prefill="streaming", recent=4),
    "renumbered": CacheMethod(positions="renumbered", sinks=2, recent=4),
    "mass": CacheMethod(budget=Uniform(tokens_kept=88), policy=AttentionMass(), recent=8, every=1),
    "recency-of-the-window": CacheMethod(budget=Uniform(tokens_kept=20), recent=4, every=1),
    "observation": CacheMethod(budget=Uniform(tokens_kept=64), policy=Observation(window=8), recent=8),
}


@pytest.mark.parametrize(("name", "chunk"), [*((name, 64) for name in WINDOWED), ("streaming", 7)])
def test_sliding_window_layers(name: str, chunk: int) -> None:
    """A window of 20: a cache that holds the newest 19 tokens and reads the 20th as it comes is the full one."""
    assert_uncached(Setup(WINDOWED[name], dims_of(inputs_of(), window=20), chunk=chunk))


def test_a_window_layer_allocates_no_more_than_its_window() -> None:
    dims = dims_of(inputs_of(), window=20)
    result = run(Setup(CacheMethod(), dims), inputs_of())
    assert sum(s.slots for s in result.cache.segments) <= 20 + 1
    assert (np.asarray(result.held) >= 0).sum(-1).max() <= 21


@pytest.mark.parametrize("name", thinned(most(METHODS)))
@pytest.mark.parametrize("poison", [math.nan, pytest.param(1e30, marks=pytest.mark.slow)])
def test_padding_and_empty_slots_change_nothing(name: str, poison: float) -> None:
    """Law 2: bit for bit."""
    clean = result_of(name)
    spoiled = run(Setup(METHODS[name], dims_of(inputs_of())), inputs_of(junk=poison), poison)
    for b, prompt in enumerate(LENGTHS):
        np.testing.assert_array_equal(clean.prompt_output[b, :prompt], spoiled.prompt_output[b, :prompt])
    np.testing.assert_array_equal(clean.outputs, spoiled.outputs)
    np.testing.assert_array_equal(clean.held, spoiled.held)


@pytest.mark.parametrize("name", thinned(most(METHODS)))
def test_a_row_does_not_depend_on_the_others(name: str) -> None:
    """Law 2: in another place of a batch of other rows of other lengths."""
    ours, others = inputs_of(), draw(12, LENGTHS, padded=64, decoded=24, query_heads=8)
    arrays = {x: getattr(others, x).copy() for x in "qkv"}
    for x, array in arrays.items():
        array[2] = getattr(ours, x)[1]
    mixed = dataclasses.replace(ours, lengths=(LENGTHS[2], LENGTHS[0], LENGTHS[1], 5), **arrays)
    result = run(Setup(METHODS[name], dims_of(mixed)), mixed)
    assert_close(result_of(name), result, row_a=1, row_b=2, prompt=LENGTHS[1])


ALONE = (
    "full",
    "h2o:tokens=24",
    "h2o:share=50%+int8",
    "random:share=50%+int2",
    "snapkv:share=50%,window=8,pool=max+int8:symmetric=true",
    "kivi-2:residual=32",
    "streaming_llm:tokens=56+kivi-2:group=16",
    "streaming-prefill-h2o",
    "every-4",
)


@pytest.mark.parametrize("name", thinned(ALONE))
def test_a_row_alone_in_a_bucket_of_its_own(name: str) -> None:
    """Law 2: neither the batch nor the length to which prompts are padded matters, also for budgets that are shares."""
    batch = inputs_of()
    index = np.arange(48 + batch.decoded) % (LENGTHS[1] + batch.decoded)
    alone = dataclasses.replace(
        batch, padded=48, lengths=LENGTHS[1:2], **{x: getattr(batch, x)[1:2, index] for x in "qkv"}
    )
    result = run(Setup(METHODS[name], dims_of(alone)), alone)
    assert_close(result_of(name), result, row_a=1, row_b=0, prompt=LENGTHS[1])


@pytest.mark.parametrize("name", most(METHODS))
def test_positions_are_a_set_with_sinks_and_recent(name: str) -> None:
    """Law 4."""
    method, result = METHODS[name], result_of(name)
    for b, prompt in enumerate(LENGTHS):
        recent = recent_of(method, prompt, 64)
        for i, heads in enumerate(sorted_positions(result, b)):
            tokens = prompt + i
            always = {*range(min(method.sinks, tokens)), *range(max(0, tokens - recent), tokens)}
            for positions in heads:
                assert len(positions) == len(set(positions))
                assert always <= set(positions) <= set(range(tokens))


def shared(positions: list[list[int]], method: CacheMethod) -> list[float]:
    """Tokens that each head holds; where heads share their places, those of a head on average."""
    counts = [len(head) for head in positions]
    return [sum(counts) / len(counts)] * len(counts) if method.budget.pooled else counts


@pytest.mark.parametrize("name", most(EVICTING))
def test_no_row_ever_holds_more_than_its_budget(name: str) -> None:
    """Law 4: at most the row's own budget, plus what was decoded where that is kept, plus the slack of `every`."""
    result = result_of(name)
    for head, method in enumerate(by_head(EVICTING[name], dims_of(inputs_of()))):
        if not method.budget.evicts or method.fate.codecs:
            continue  # nothing is evicted, or what is lives on
        for b, prompt in enumerate(LENGTHS):
            limit = max(budget_of(method, prompt, 64), always_of(method, prompt, 64))
            for i, heads in enumerate(sorted_positions(result, b)):
                slack = i if method.every is None else min(i, method.every - method.block)
                assert shared(heads, method)[head] <= limit + slack, (b, i)


@pytest.mark.parametrize("name", most(METHODS))
def test_nothing_is_lost_before_the_budget_is_full(name: str) -> None:
    """Prompts of one token or 17, shorter than the sinks, the window or a block, are held whole as long as they fit."""
    result = result_of(name)
    for head, method in enumerate(by_head(METHODS[name], dims_of(inputs_of()))):
        keeps_all = not method.budget.evicts or bool(method.fate.codecs)
        for b, prompt in enumerate(LENGTHS):
            fits = math.inf if keeps_all else budget_of(method, prompt, 64) - 2 * (method.block - 1)
            for i, heads in enumerate(sorted_positions(result, b)):
                assert shared(heads, method)[head] >= min(prompt + i, fits), (b, i)
                assert prompt + i - 1 in heads[head]


@pytest.mark.parametrize("name", most(EVICTING))
def test_budgets_are_used(name: str) -> None:
    """The longest row fills its budget up to two blocks, one by which the ring rises and falls and one of rounding."""
    counts = sorted_positions(result_of(name), 0)[0]
    for head, method in enumerate(by_head(EVICTING[name], dims_of(inputs_of()))):
        assert shared(counts, method)[head] > method.budget.tokens(64) - max(2 * method.block - 1, 1)


@pytest.mark.parametrize("name", ["h2o:tokens=24", "snapkv:tokens=24,window=8", "policy-mass-max-normalised"])
def test_what_is_kept_does_not_depend_on_the_blocks_of_queries(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law 5: the exact prefill and the scores may visit the prompt's queries in blocks of any size."""
    expected = sorted_positions(result_of(name), 0)[0]
    for op in ("prefill_attention", "attention_mass"):
        monkeypatch.setattr(importlib.import_module(f"pallas_kernels.{op}.xla"), "CACHE_BYTES", 1)
    method = dataclasses.replace(METHODS[name], name="in small blocks")
    assert sorted_positions(run(Setup(method, dims_of(inputs_of())), inputs_of()), 0)[0] == expected


def test_the_full_method_keeps_everything() -> None:
    method = METHODS["full"]
    assert method.budget == Full() and method.policy == Recency()
    assert sorted_positions(result_of("full"), 0)[-1] == [list(range(88))] * 2
