"""Keys that are coded in whole windows while values slide out one by one (KIVI as released)."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from kvjax.cache import methods
from kvjax.cache.budget import Uniform
from kvjax.cache.codec import Integer
from kvjax.cache.method import CacheMethod
from kvjax.errors import UsageError
from tests.cache.driver import Inputs, Run, Setup, dims_of, draw, run
from tests.cache.faithful import GROUPED, TOLERANCE
from tests.cache.test_transcriptions import assert_codes
from tests.oracles.kivi_released import kivi_released

RESIDUAL, GROUP = 32, 16


def inputs_of(query_heads: int) -> Inputs:
    """Prompts that fill the window never, twice, just so, and all but one token of it."""
    return draw(4, (20, 79, 64, 31), padded=80, decoded=40, query_heads=query_heads)


def check(setup: Setup, inputs: Inputs, result: Run, bits: int) -> None:
    body = result.cache.body
    keys, values = (np.asarray(x) for x in (body.decoded_keys, body.decoded_values))
    for b, prompt in enumerate(inputs.lengths):
        trace = kivi_released(inputs.row(b, setup), key_bits=bits, value_bits=bits, group=GROUP, residual=RESIDUAL)
        np.testing.assert_allclose(result.prompt_output[b, :prompt], trace.prompt_output, atol=TOLERANCE, rtol=0)
        np.testing.assert_allclose(result.outputs[:, b], np.stack(trace.outputs), atol=TOLERANCE, rtol=0)
        coded = trace.coded_values[-1]
        slots = body.positions[b, 0]
        assert slots[:coded].tolist() == list(range(coded)) and (slots[coded:] == -1).all()
        for head in range(2):
            assert_codes(keys[b, head, : trace.coded_keys[-1]], trace.keys[head])
            assert_codes(values[b, head, :coded], trace.values[head])


@GROUPED
@pytest.mark.parametrize("bits", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_kivi_released(query_heads: int, bits: int) -> None:
    inputs = inputs_of(query_heads)
    setup = Setup(methods.kivi_released(bits, GROUP, RESIDUAL), dims_of(inputs))
    check(setup, inputs, run(setup, inputs), bits)


def test_a_streaming_prefill_codes_the_same() -> None:
    """In chunks that do not divide the window; its outputs are those of another algorithm."""
    inputs = inputs_of(2)
    method = methods.kivi_released(2, GROUP, RESIDUAL)
    exact = run(Setup(method, dims_of(inputs)), inputs)
    streamed = run(Setup(dataclasses.replace(method, prefill="streaming"), dims_of(inputs), chunk=20), inputs)
    np.testing.assert_allclose(streamed.outputs, exact.outputs, atol=1e-5, rtol=0)


def test_what_keys_first_needs() -> None:
    codec = Integer(bits=4, axis="channel", group=8)
    with pytest.raises(UsageError, match="recent=12 must be a multiple of 8"):
        CacheMethod(keys=codec, recent=12, flush="keys first")
    with pytest.raises(UsageError, match="cannot compete"):
        CacheMethod(keys=codec, recent=16, flush="keys first", budget=Uniform(tokens_kept=24))
