"""Each named method equals a slow NumPy transcription of its description: kept sets, codes, outputs (law 10)."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from kvjax.cache import methods
from kvjax.cache.budget import Uniform
from kvjax.cache.method import CacheMethod
from kvjax.cache.policy import AttentionMass, Random, Slots
from kvjax.typing import Array
from tests.cache.driver import Setup, dims_of, draw, run
from tests.cache.faithful import GROUPED, assert_outputs, assert_same, check, inputs_of
from tests.oracles.attention import attend
from tests.oracles.h2o import h2o, h2o_streaming
from tests.oracles.quantised import Coded, encode, kivi, per_token
from tests.oracles.row import Row, Trace
from tests.oracles.scored import scored
from tests.oracles.snapkv import snapkv
from tests.oracles.streaming_llm import streaming_llm


@GROUPED
@pytest.mark.parametrize("positions", ["", ",positions=renumbered"], ids=["original", "renumbered"])
def test_streaming_llm(query_heads: int, positions: str) -> None:
    """A cache of 24 tokens and the token that is being decoded are the paper's cache of 25."""
    inputs = inputs_of(query_heads)
    setup = Setup(methods.parse(f"streaming_llm:tokens=24{positions}"), dims_of(inputs))
    result = run(setup, inputs)
    for b in range(len(inputs.lengths)):
        trace = streaming_llm(inputs.row(b, setup), capacity=25, sinks=4, renumber=bool(positions))
        for i, read in enumerate(trace.kept[1:]):
            token = inputs.lengths[b] + i
            for head in range(2):
                assert [*result.kept(i, b, head), token] == read[head]
        assert_outputs(result, b, trace)


@GROUPED
@pytest.mark.parametrize("tokens", [24, 25])
def test_h2o(query_heads: int, tokens: int) -> None:
    inputs = inputs_of(query_heads)
    setup = Setup(methods.parse(f"h2o:tokens={tokens}"), dims_of(inputs))
    check(setup, inputs, lambda row: h2o(row, sinks=0, recent=tokens // 2, heavy=tokens - tokens // 2))


@pytest.mark.parametrize("every", [1, 4])
def test_h2o_with_sinks(every: int) -> None:
    inputs = inputs_of(8, seed=1)
    method = CacheMethod(budget=Uniform(tokens_kept=24), policy=AttentionMass(), sinks=3, recent=8, every=every)
    check(Setup(method, dims_of(inputs)), inputs, lambda row: h2o(row, sinks=3, recent=8, heavy=13, every=every))


def test_h2o_reads_heads_by_a_map_and_caps_logits() -> None:
    """Unequal groups in any order; padded places of the smaller group count for nothing."""
    inputs = draw(2, (64, 45, 17, 1), padded=64, decoded=24, query_heads=6)
    setup = Setup(methods.h2o(tokens=24), dims_of(inputs), reads=(1, 0, 1, 1, 1, 0), softcap=5.0)
    check(setup, inputs, lambda row: h2o(row, sinks=0, recent=12, heavy=12))


def test_h2o_in_a_layer_with_a_sliding_window() -> None:
    """A token that no query can see any more gains nothing, and stays as long as its score is good enough."""
    inputs = inputs_of(8, seed=8)
    setup = Setup(methods.parse("h2o:tokens=24"), dims_of(inputs, window=20))
    check(setup, inputs, lambda row: h2o(row, sinks=0, recent=12, heavy=12))


def test_h2o_with_renumbered_positions() -> None:
    """Each kv head counts the places of what it holds itself."""
    inputs = inputs_of(8, seed=6)
    method = CacheMethod(
        budget=Uniform(tokens_kept=24), policy=AttentionMass(), recent=8, every=1, positions="renumbered"
    )
    check(Setup(method, dims_of(inputs)), inputs, lambda row: h2o(row, sinks=0, recent=8, heavy=16, renumber=True))


@pytest.mark.parametrize("positions", ["original", "renumbered"])
def test_h2o_with_questions_of_several_tokens(positions: str) -> None:
    """Tokens of one step read what was held before it and, causally, each other; then they enter one by one."""
    inputs = inputs_of(8, seed=7)
    renumber = positions == "renumbered"
    method = CacheMethod(budget=Uniform(tokens_kept=24), policy=AttentionMass(), sinks=2, recent=4, every=1)
    setup = Setup(dataclasses.replace(method, positions=positions), dims_of(inputs), together=8)
    check(setup, inputs, lambda row: h2o(row, sinks=2, recent=4, heavy=18, together=8, renumber=renumber))


def test_h2o_share_is_of_each_rows_own_prompt() -> None:
    """Half of the budget is recent and half heavy, whatever the length to which the prompt was padded."""
    inputs = inputs_of(8)
    setup = Setup(methods.h2o(share=0.5), dims_of(inputs))

    def transcribe(row: Row) -> Trace:
        recent = max(1, row.prompt // 4)
        return h2o(row, sinks=0, recent=recent, heavy=max(1, row.prompt // 2 - recent))

    check(setup, inputs, transcribe)


@pytest.mark.parametrize("chunk", [1, 7, 16])
def test_h2o_with_a_streaming_prefill(chunk: int) -> None:
    inputs = inputs_of(8, seed=3)
    method = CacheMethod(
        budget=Uniform(tokens_kept=24), policy=AttentionMass(), sinks=2, recent=8, prefill="streaming", every=1
    )
    setup = Setup(method, dims_of(inputs), chunk=chunk)
    check(setup, inputs, lambda row: h2o_streaming(row, sinks=2, recent=8, heavy=14, chunk=chunk))


@GROUPED
@pytest.mark.parametrize("kernel", ["", ",kernel=1"])
def test_snapkv(query_heads: int, kernel: str) -> None:
    inputs = inputs_of(query_heads)
    setup = Setup(methods.parse(f"snapkv:tokens=24,window=8{kernel}"), dims_of(inputs))
    check(setup, inputs, lambda row: snapkv(row, capacity=24, window=8, kernel=1 if kernel else 5))


@GROUPED
def test_random(query_heads: int) -> None:
    """Which tokens are random is the policy's own; that they are kept by these scores is what is checked."""
    inputs = inputs_of(query_heads)
    method = methods.random(tokens=24, seed=5)
    setup = Setup(method, dims_of(inputs, layer=2))
    result = run(setup, inputs)
    assert isinstance(method.policy, Random)
    positions = np.arange(inputs.q.shape[1])[None, None]
    slots = Slots(positions=positions, stats=None, seen=None, head_index=result.cache.head_index)
    scores = np.asarray(method.policy.slot_scores(slots), np.float64)[0]
    assert len(np.unique(scores)) == scores.size
    for b in range(len(inputs.lengths)):
        assert_same(result, b, scored(inputs.row(b, setup), scores, sinks=4, recent=6, places=14))


def assert_codes(decoded: Array, coded: Coded) -> None:
    """decoded [S, H] of the cache; a number half-way between two codes may be rounded to either."""
    difference = np.abs(np.asarray(decoded, np.float64) - coded.decoded)
    close = np.abs(coded.exact % 1.0 - 0.5) < 1e-5
    assert (difference <= np.where(close, coded.scale, 0) + 1e-5).all()


@GROUPED
@pytest.mark.parametrize(("bits", "residual"), [(2, 32), (4, 34), (8, 1)])
def test_kivi(query_heads: int, bits: int, residual: int) -> None:
    inputs = draw(4, (128, 101, 30), padded=128, decoded=40, query_heads=query_heads)
    setup = Setup(methods.kivi(bits=bits, residual=residual), dims_of(inputs))
    result = run(setup, inputs)
    body = result.cache.body
    keys, values = body.key_codec.decode(body.keys), body.value_codec.decode(body.values)
    for b in range(len(inputs.lengths)):
        trace = kivi(inputs.row(b, setup), bits=bits, window=residual, group=32)
        for head in range(2):
            coded = trace.coded[-1]
            slots = body.positions[b, min(head, body.positions.shape[1] - 1)]
            assert slots[:coded].tolist() == list(range(coded)) and (slots[coded:] == -1).all()
            assert_codes(keys[b, head, :coded], trace.keys[head])
            assert_codes(values[b, head, :coded], trace.values[head])
        assert_outputs(result, b, trace)


@GROUPED
@pytest.mark.parametrize(("spec", "bits", "group"), [("int8", 8, 32), ("int4:group=16", 4, 16), ("int2", 2, 32)])
def test_integers_per_token(query_heads: int, spec: str, bits: int, group: int) -> None:
    inputs = inputs_of(query_heads)
    setup = Setup(methods.parse(spec), dims_of(inputs))
    result = run(setup, inputs)
    body = result.cache.body
    keys, values = body.key_codec.decode(body.keys), body.value_codec.decode(body.values)
    for b in range(len(inputs.lengths)):
        trace = per_token(inputs.row(b, setup), bits=bits, group=group)
        tokens = trace.coded[-1]
        for head in range(2):
            assert_codes(keys[b, head, :tokens], trace.keys[head])
            assert_codes(values[b, head, :tokens], trace.values[head])
        assert_outputs(result, b, trace)


def test_snapkv_in_four_bits() -> None:
    """A composition evicts like one part and stores like the other: window exact, the rest coded per token."""
    inputs = inputs_of(8)
    setup = Setup(methods.parse("snapkv:tokens=24,window=8+int4"), dims_of(inputs))
    result = run(setup, inputs)
    for b in range(len(inputs.lengths)):
        row = inputs.row(b, setup)
        trace = snapkv(row, capacity=24, window=8, kernel=5)
        trace.outputs = [_attend_coded(row, row.prompt + i, kept) for i, kept in enumerate(trace.kept[:-1])]
        assert_same(result, b, trace)


def _attend_coded(row: Row, t: int, kept: list[list[int]]) -> np.ndarray:
    """Token t reads its own key and value and the 8 newest cached ones exactly, the others in 4 bits."""
    q, k = row.rotated
    keys, values = [], []
    for head, positions in enumerate(kept):
        for stored, x in ((keys, k[:, head]), (values, row.v[:, head])):
            coded = encode(x[positions[:-8]], 4, 32, axis=1).decoded if len(positions) > 8 else x[:0]
            stored.append(np.concatenate([coded, x[[*positions[-8:], t]]]))
    return attend(q[t], keys, values)[0]


def test_rows_share_nothing_with_the_layer_index_but_random_draws() -> None:
    """Another layer draws other random tokens; a deterministic method does the same in every layer."""
    inputs = inputs_of(2)
    first, second = (
        run(Setup(methods.random(tokens=24), dataclasses.replace(dims_of(inputs), layer=layer)), inputs)
        for layer in (0, 1)
    )
    assert first.kept(0, 0, 0) != second.kept(0, 0, 0) and first.kept(0, 0, 0) != first.kept(0, 0, 1)
