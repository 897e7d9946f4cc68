"""A recorded prompt that the model repeats: scores and outputs as in NumPy, for ragged rows and any map of heads."""

from __future__ import annotations

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.cache.describe import from_json, to_json
from kvjax.cache.method import CacheMethod
from kvjax.cache.methods import parse
from kvjax.cache.policy import Chunks, Critical, Given, OverHeads, Repetition
from kvjax.cache.repeat import Repeating, repeating
from kvjax.cache.step import Step
from kvjax.errors import UsageError
from tests.cache.driver import QUICK, THETA, Inputs, Setup, dims_of, draw, step_of
from tests.oracles.attention import attend
from tests.oracles.kvzip import chunks, kvzip_row_scores
from tests.oracles.rotary import rotate_each

SIZE, SAID, SINKS = 16, 20, 4
LENGTHS = (40, 33, 5)
COUNTS = ((20, 18, 9), (19, 20, 0), (12, 5, 0))  # of each piece: tokens that each row says


@functools.partial(jax.jit, compiler_options=QUICK)
def advance(cache: Repeating, step: Step) -> tuple[jax.Array, Repeating]:
    return cache.step(step)


def begin(setup: Setup, inputs: Inputs) -> Repeating:
    lengths = jnp.asarray(inputs.lengths)
    exists = jnp.arange(inputs.padded) < lengths[:, None]
    prompt = step_of(setup, [jnp.asarray(x) for x in inputs.prompt()], 0 * lengths, exists)
    return repeating(prompt, Repetition(chunk=SIZE, sinks=SINKS), SIZE)


def piece_of(setup: Setup, index: int, junk: float) -> Step:
    """What the rows say in one piece, behind their prompts."""
    heads = setup.dims.query_heads
    said = draw(100 + index, LENGTHS, padded=0, decoded=SAID, query_heads=heads)
    exists = np.arange(SAID) < np.array(COUNTS[index])[:, None]
    arrays = [jnp.asarray(np.where(exists[..., None, None], x, junk)) for x in (said.q, said.k, said.v)]
    return step_of(setup, arrays, jnp.asarray(LENGTHS), jnp.asarray(exists))


def repeated(setup: Setup, inputs: Inputs, junk: float = 3.0) -> tuple[list[np.ndarray], np.ndarray]:
    """The outputs [B, Q, N, H] of each piece, and the scores [B, K, T] after all of them."""
    cache, outputs = begin(setup, inputs), []
    for index in range(len(COUNTS)):
        start = np.minimum(SIZE * index, LENGTHS).astype(np.int32)
        stop = np.minimum(SIZE * (index + 1), LENGTHS).astype(np.int32)
        cache = dataclasses.replace(cache, start=jnp.asarray(start), stop=jnp.asarray(stop))
        output, cache = advance(cache, piece_of(setup, index, junk))
        outputs.append(np.asarray(output))
    return outputs, np.asarray(cache.scores)


def setup_of(query_heads: int, **changes) -> tuple[Setup, Inputs]:
    inputs = draw(3, LENGTHS, padded=40, decoded=1, query_heads=query_heads)
    return Setup(CacheMethod(), dims_of(inputs), **changes), inputs


def rotated(setup: Setup, index: int, b: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What row b says in a piece, in NumPy: queries and keys at their positions, and values."""
    step, count = piece_of(setup, index, 0.0), COUNTS[index][b]
    q, k, v = (np.asarray(x, np.float64)[b, :count] for x in (step.queries, step.keys, step.values))
    positions = LENGTHS[b] + np.arange(count)
    return rotate_each(q, positions, THETA), rotate_each(k, positions, THETA), v


@pytest.mark.parametrize(
    ("query_heads", "reads"),
    [(2, None), (8, None), (8, (1, 0, 1, 1, 0, 1, 1, 1))],
    ids=["G=1", "G=4", "unequal groups"],
)
def test_scores_are_the_transcriptions(query_heads: int, reads: tuple[int, ...] | None) -> None:
    setup, inputs = setup_of(query_heads, reads=reads)
    scores = repeated(setup, inputs)[1]
    for b, length in enumerate(LENGTHS):
        said = [rotated(setup, index, b)[:2] for index in range(len(chunks(length, SIZE)))]
        expected = kvzip_row_scores(inputs.row(b, setup), said, size=SIZE, sinks=SINKS)
        assert expected.std() > 0.05, "the attention is flat, so nothing is compared"
        np.testing.assert_allclose(scores[b, :, SINKS:length], expected[:, SINKS:], atol=1e-6)
        np.testing.assert_array_equal(scores[b, :, length:], 0)


def test_outputs_are_attention_to_the_whole_prompt_and_to_what_was_said() -> None:
    setup, inputs = setup_of(8, softcap=4.0)
    outputs = repeated(setup, inputs)[0]
    for b, length in enumerate(LENGTHS):
        row = inputs.row(b, setup)
        for index in range(len(chunks(length, SIZE))):
            q, k, v = rotated(setup, index, b)
            for i in range(len(q)):
                keys = np.concatenate([row.rotated[1][:length], k[: i + 1]])
                values = np.concatenate([row.v[:length], v[: i + 1]])
                expected, _ = attend(q[i], list(keys.swapaxes(0, 1)), list(values.swapaxes(0, 1)), softcap=4.0)
                np.testing.assert_allclose(outputs[index][b, i], expected, atol=1e-5)


def test_a_sliding_window_ends_what_is_seen() -> None:
    """Of a window of 12 tokens, what lies further behind the prompt's end is never looked at."""
    setup, inputs = setup_of(2)
    setup = dataclasses.replace(setup, dims=dims_of(inputs, window=12))
    scores = repeated(setup, inputs)[1][0]
    assert (scores[:, SIZE : LENGTHS[0] - 11] == 0).all() and (scores[:, LENGTHS[0] - 8 : LENGTHS[0]] > 0).all()


def test_padding_changes_nothing() -> None:
    setup, inputs = setup_of(8)
    clean, spoiled = (repeated(setup, dataclasses.replace(inputs, junk=junk), junk) for junk in (3.0, np.nan))
    np.testing.assert_array_equal(clean[1], spoiled[1])
    for index, (a, b) in enumerate(zip(clean[0], spoiled[0], strict=True)):
        for row, count in enumerate(COUNTS[index]):
            np.testing.assert_array_equal(a[row, :count], b[row, :count])


def test_what_changes_scores_asks_for_the_same_repetition() -> None:
    inner = Given(Repetition(chunk=64))
    for policy in (inner, Chunks(inner), Critical(inner), OverHeads(inner)):
        method = CacheMethod(budget=parse("h2o").budget, policy=policy, recent=1)
        assert method.repetition == Repetition(chunk=64)
        assert from_json(json.loads(json.dumps(to_json(method))), CacheMethod) == method
    assert CacheMethod(policy=inner).repetition is None, "nothing is evicted, so no scores are needed"
    assert parse("snapkv").repetition is None


def test_it_is_refused_where_it_cannot_run() -> None:
    with pytest.raises(UsageError, match=r"Given has the model repeat the whole prompt.*exact"):
        dataclasses.replace(parse("kvzip"), budget=parse("h2o").budget, prefill="streaming")
    with pytest.raises(UsageError, match="chunk is at least 1"):
        parse("kvzip:chunk=0")
