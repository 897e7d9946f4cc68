"""Comparisons of a run with a transcription."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tests.cache.driver import Inputs, Run, Setup, draw, run
from tests.oracles.quantised import CodedTrace
from tests.oracles.row import Row, Trace

TOLERANCE = 1e-5
GROUPED = pytest.mark.parametrize("query_heads", [pytest.param(2, marks=pytest.mark.slow), 8], ids=["G=1", "G=4"])


def inputs_of(query_heads: int, seed: int = 0) -> Inputs:
    return draw(seed, (64, 45, 17, 1), padded=64, decoded=24, query_heads=query_heads)


def assert_outputs(result: Run, b: int, trace: Trace | CodedTrace) -> None:
    prompt = len(trace.prompt_output)
    np.testing.assert_allclose(result.prompt_output[b, :prompt], trace.prompt_output, atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(result.outputs[:, b], np.stack(trace.outputs), atol=TOLERANCE, rtol=0)


def assert_same(result: Run, b: int, trace: Trace) -> None:
    """Kept sets after the prompt and after every token, and all outputs, of row b."""
    assert trace.gap > 1e-6, "the drawn scores tie: choose another seed"
    for i, kept in enumerate(trace.kept):
        assert [result.kept(i, b, head) for head in range(len(kept))] == [sorted(k) for k in kept], f"after token {i}"
    assert_outputs(result, b, trace)


def check(setup: Setup, inputs: Inputs, transcribe: Callable[[Row], Trace]) -> None:
    """All rows of `inputs` do what the transcription does."""
    result = run(setup, inputs)
    for b in range(len(inputs.lengths)):
        assert_same(result, b, transcribe(inputs.row(b, setup)))
