"""ThinK, CSKV and KVTuner equal slow NumPy transcriptions of their descriptions."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.cache.codec import Integer
from kvjax.cache.codec.balanced import FLOOR, Balanced
from kvjax.cache.method import CacheMethod
from kvjax.cache.methods import parse
from kvjax.calibration.layer_bits import PAIRS, choose, pareto, sensitivity
from kvjax.errors import UsageError
from tests.cache.driver import Inputs, Setup, dims_of, draw, run, step_of
from tests.cache.faithful import GROUPED, TOLERANCE
from tests.cache.parameters import learnt
from tests.oracles import cskv, kvtuner, mikv, think
from tests.oracles.row import Row

LENGTHS = (44, 17, 1)


def inputs_of(query_heads: int, seed: int) -> Inputs:
    return draw(seed, LENGTHS, padded=44, decoded=6, query_heads=query_heads)


def assert_close(actual: Any, expected: np.ndarray) -> None:
    np.testing.assert_allclose(np.asarray(actual), expected, atol=TOLERANCE, rtol=0)


@GROUPED
def test_think(query_heads: int) -> None:
    """The channels that stay, and what the first decoded token reads; later ones find that tokens have left the window,
    which then lose channels here and not in the transcription.
    """
    inputs = inputs_of(query_heads, seed=0)
    setup = Setup(parse("think:share=0.5,window=8,recent=8"), dims_of(inputs))
    result = run(setup, inputs)
    body = result.cache.body
    assert body is not None
    for b, prompt in enumerate(LENGTHS):
        trace = think.think(inputs.row(b, setup), window=8, channels=16, whole=8)
        assert trace.gap > 1e-5
        for head in range(2):
            assert np.flatnonzero(body.key_params[b, head]).tolist() == trace.channels[head]
        assert_close(result.prompt_output[b, :prompt], trace.prompt_output)
        assert_close(result.outputs[0, b], trace.outputs[0])


@GROUPED
def test_balancers(query_heads: int) -> None:
    inputs = inputs_of(query_heads, seed=0)
    setup = Setup(CacheMethod(keys=Balanced(Integer(2, "token", 16)), values=Integer(2, "token", 16)), dims_of(inputs))
    body = run(setup, inputs).cache.body
    assert body is not None
    for b, prompt in enumerate(LENGTHS):
        row = inputs.row(b, setup)
        q, k = (x[:prompt] for x in row.rotated)
        reads = [n // (query_heads // 2) for n in range(query_heads)]
        assert_close(body.key_params[b], mikv.balancer(q, k, reads, floor=FLOOR))


@GROUPED
@pytest.mark.parametrize("bits", [16, 4])
def test_cskv(query_heads: int, bits: int) -> None:
    """A window that is full is exact for one token longer than in the transcription: that token is left out."""
    inputs = inputs_of(query_heads, seed=2)
    setup = Setup(parse(f"cskv:window=8,bits={bits}"), dims_of(inputs))
    result = run(setup, inputs)
    keys, values = (learnt(c, setup.dims, seed) for c, seed in zip(setup.method.codecs, (1, 2), strict=True))
    ups = [np.moveaxis(x["decoder"][0], 0, 1).reshape(x["decoder"].shape[2], -1) for x in (keys, values)]
    for b, prompt in enumerate(LENGTHS):
        row = inputs.row(b, setup)
        trace = cskv.cskv(
            row,
            key_latents=row.k.reshape(row.tokens, -1) @ keys["encoder"][0, 0].astype(np.float64),
            value_latents=row.v.reshape(row.tokens, -1) @ values["encoder"][0, 0].astype(np.float64),
            key_up=ups[0].astype(np.float64),
            value_up=ups[1].astype(np.float64),
            window=8,
            key_bits=None if bits == 16 else bits,
            value_bits=None if bits == 16 else bits,
            value_group=ups[1].shape[0],
            clamped_zero=False,
        )
        for coded in (trace.key_codes, trace.value_codes):
            if coded is not None and coded.exact.size:
                assert np.abs(coded.exact - np.floor(coded.exact) - 0.5).min() > 2e-6, "another seed"
        assert_close(result.prompt_output[b, :prompt], trace.prompt_output)
        same = [i for i in range(6) if (prompt + i) % 8]
        assert_close(result.outputs[np.array(same), b], np.stack([trace.outputs[i] for i in same]))


@GROUPED
def test_kvtuner_reads_integers_of_each_layers_bits(query_heads: int) -> None:
    inputs = inputs_of(query_heads, seed=3)
    for layer, bits in ((0, (8, 4)), (1, (4, 2)), (3, (4, 2))):
        dims = dataclasses.replace(dims_of(inputs), layer=layer, layers=4)
        by_layer, plain = (
            run(Setup(method, dims), inputs)
            for method in (
                parse("kvtuner:table=k8v4-k4v2,mode=token"),
                CacheMethod(keys=Integer(bits[0]), values=Integer(bits[1])),
            )
        )
        np.testing.assert_array_equal(by_layer.outputs, plain.outputs)


@GROUPED
def test_sensitivity(query_heads: int) -> None:
    """Every token coded by itself, also for the query that comes with it."""
    inputs = inputs_of(query_heads, seed=4)
    setup = Setup(CacheMethod(), dims_of(inputs))
    row = inputs.row(0, setup)
    one = Row(row.q[:20], row.k[:20], row.v[:20], 0)
    expected = kvtuner.layer_errors(one, PAIRS, group=None, residual=0)
    arrays = [jnp.asarray(x[:1, :20]) for x in (inputs.q, inputs.k, inputs.v)]
    step = step_of(setup, arrays, jnp.zeros((1,), jnp.int32), jnp.ones((1, 20), bool))
    got = [float(sensitivity(step, Integer(keys), Integer(values))) for keys, values in PAIRS]
    np.testing.assert_allclose(got, expected, rtol=2e-3)


@pytest.mark.parametrize("seed", range(5))
def test_the_choice_is_the_best_in_the_limit(seed: int) -> None:
    rng = np.random.default_rng(seed)
    drawn = rng.random((4, len(PAIRS))) * [2.0 ** -(k + v) for k, v in PAIRS]
    errors = [dict(zip(PAIRS, line, strict=True)) for line in drawn.tolist()]
    kept = [kvtuner.pareto(PAIRS, list(line.values())) for line in errors]
    for line, indices in zip(errors, kept, strict=True):
        assert list(pareto(line)) == [PAIRS[i] for i in indices]
    for limit in (2.0, 3.1, 4.5, 8.0):
        expected, _ = kvtuner.choose_exhaustively(drawn.tolist(), PAIRS, kept, [[i] for i in range(4)], limit=limit)
        choice = choose(errors, limit)
        assert choice.layers == tuple(PAIRS[i] for i in expected) and choice.mean_bits <= limit
        assert parse(f"kvtuner:table={choice.table}").keys.codecs == tuple(  # type: ignore[attr-defined]
            Integer(PAIRS[i][0], "channel", 32) for i in expected
        )


def test_a_limit_that_nothing_meets_is_refused() -> None:
    with pytest.raises(UsageError, match=r"smallest choice takes 2 bits; the limit is 1\.5"):
        choose([{(2, 2): 0.1, (4, 2): 0.05}], 1.5)
    with pytest.raises(UsageError, match="written k8v4-k4v2-…, one entry per layer; got 'x'"):
        parse("kvtuner:table=k8v4-x")
