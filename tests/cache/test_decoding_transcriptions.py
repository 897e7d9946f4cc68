"""Policies whose scores change while tokens are decoded: the same kept sets and outputs as in NumPy."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.cache.budget import Uniform
from kvjax.cache.method import CacheMethod
from kvjax.cache.methods import parse
from kvjax.cache.policy import Keyformer, LastAttention, OverHeads, Redundancy
from kvjax.errors import UsageError
from pallas_kernels.attention_mass import GumbelNoise
from tests.cache.driver import Inputs, Setup, dims_of, draw, run
from tests.cache.faithful import GROUPED, assert_outputs, assert_same, check, inputs_of
from tests.oracles.keyformer import keyformer, keyformer_released, temperature
from tests.oracles.prefixkv import prefixkv
from tests.oracles.rkv import rkv
from tests.oracles.row import Row, Trace
from tests.oracles.tova import tova, tova_once, tova_streaming


@GROUPED
def test_tova(query_heads: int) -> None:
    inputs = inputs_of(query_heads)
    check(Setup(parse("tova:tokens=24"), dims_of(inputs)), inputs, lambda row: tova(row, capacity=24))


def test_tova_averages_over_query_heads_in_groups_of_any_size() -> None:
    inputs = draw(2, (64, 45, 17, 1), padded=64, decoded=24, query_heads=6)
    setup = Setup(parse("tova:tokens=24"), dims_of(inputs), reads=(1, 0, 1, 1, 1, 0))
    check(setup, inputs, lambda row: tova(row, capacity=24))


def test_tova_at_the_end_of_the_prompt_alone() -> None:
    inputs = inputs_of(8, seed=1)
    method = dataclasses.replace(parse("tova:tokens=24"), every=None)
    check(Setup(method, dims_of(inputs)), inputs, lambda row: tova_once(row, capacity=24))


def test_tova_with_a_streaming_prefill() -> None:
    inputs = inputs_of(8, seed=2)
    method = dataclasses.replace(parse("tova:tokens=24"), prefill="streaming")
    setup = Setup(method, dims_of(inputs), chunk=1)
    check(setup, inputs, lambda row: tova_streaming(row, capacity=24))


def test_over_heads_refuses_what_is_the_same_for_all_heads() -> None:
    with pytest.raises(UsageError, match="the same tokens anyway"):
        OverHeads(OverHeads(LastAttention()))


@GROUPED
@pytest.mark.parametrize(
    ("decoded", "transcribed"), [("kept", "grow"), ("importance", "importance"), ("positional", "positional")]
)
def test_prefixkv(query_heads: int, decoded: str, transcribed: Literal["grow", "importance", "positional"]) -> None:
    """One layer. Rows whose prompt overflows: without forgetting, nothing goes later in the release."""
    inputs = draw(4, (64, 45), padded=64, decoded=24, query_heads=query_heads)
    setup = Setup(parse(f"prefixkv:tokens=24,decoded={decoded},distance=9"), dims_of(inputs))
    result = run(setup, inputs)
    for b, length in enumerate(inputs.lengths):
        ratio = 1 - 24 / length
        row = inputs.row(b, setup)
        assert_same(result, b, prefixkv(row, ratio=ratio, start=4, distance=-9, decode=transcribed, grows=False))


def noise_of(inputs: Inputs, seed: int, layer: int) -> np.ndarray:
    """The draws of a layer, [N, T, T]: query head, query, key."""
    tokens, query_heads, kv_heads = inputs.q.shape[1], inputs.q.shape[2], inputs.k.shape[2]
    key = jax.random.key_data(jax.random.key(seed, impl="threefry2x32"))
    noise = GumbelNoise(key, layer * kv_heads + jnp.arange(kv_heads))
    positions = jnp.arange(tokens)[None]
    drawn = noise.at(positions, positions, query_heads // kv_heads)
    return np.asarray(drawn, np.float64).reshape(query_heads, tokens, tokens)


@GROUPED
@pytest.mark.parametrize("noisy", [True, False], ids=["noise", "no noise"])
def test_keyformer(query_heads: int, noisy: bool) -> None:
    """As described: 7 recent tokens, 17 key tokens; the temperature goes on rising in all 24 steps of 40."""
    inputs = inputs_of(query_heads)
    policy = Keyformer(start=1.0, end=2.5, steps=40, seed=4, noisy=noisy)
    method = dataclasses.replace(parse("keyformer:tokens=24"), policy=policy)
    noise = noise_of(inputs, seed=4, layer=3) * noisy
    tau = temperature(start=1.0, end=2.5, generated=40)
    setup = Setup(method, dims_of(inputs, layer=3, layers=4))
    check(setup, inputs, lambda row: keyformer(row, recent=7, key=17, tau=tau, noise=noise))


def test_keyformer_with_sinks_stops_heating_after_its_steps() -> None:
    """Sinks are in the softmax and are never chosen."""
    inputs = inputs_of(2, seed=1)
    method = CacheMethod(
        budget=Uniform(tokens_kept=24), policy=Keyformer(start=2.0, end=4.0, steps=6, seed=1), recent=8, every=1
    )
    noise = noise_of(inputs, seed=1, layer=0)

    def tau(step: int) -> float:
        return temperature(start=2.0, end=4.0, generated=6)(min(step, 6))

    setup = Setup(method, dims_of(inputs))
    check(setup, inputs, lambda row: keyformer(row, recent=8, key=16, tau=tau, noise=noise))


@GROUPED
def test_keyformer_as_released(query_heads: int) -> None:
    """Its window of 8 and budget of 25 count the token that is being decoded. Rows that overflow, as with any share."""
    inputs = inputs_of(query_heads)
    setup = Setup(parse("keyformer_released:tokens=24,seed=2"), dims_of(inputs))
    result = run(setup, inputs)
    tau, noise = temperature(start=1.0, end=2.0, generated=256), noise_of(inputs, seed=2, layer=0)
    for b in (0, 1):
        trace = keyformer_released(inputs.row(b, setup), recent=8, key=17, tau=tau, noise=noise)
        assert_same(result, b, trace)
        key_tokens = {p for p in result.kept(0, b, 0) if p < inputs.lengths[b] - 7}
        assert key_tokens <= set(result.kept(-1, b, 0))


def alike(inputs: Inputs) -> Inputs:
    """Keys that repeat what was said 3 and 20 tokens before: in the channels that rotation turns slowly."""
    k = inputs.k.copy()
    slow = [*range(8, 16), *range(24, 32)]
    for t in range(inputs.k.shape[1]):
        for back in (3, 20):
            if t >= back and t % 4:
                k[:, t][..., slow] += 0.8 * k[:, t - back][..., slow]
    return dataclasses.replace(inputs, k=k)


@GROUPED
@pytest.mark.parametrize(("mix", "threshold"), [(0.1, 0.5), (0.0, 0.3)], ids=["both", "redundancy alone"])
def test_rkv(query_heads: int, mix: float, threshold: float) -> None:
    """Rows whose prompt fills the budget: others are first compressed when `every` tokens more than it are held."""
    inputs = alike(draw(3, (64, 45, 24), padded=64, decoded=24, query_heads=query_heads))
    method = parse("rkv:tokens=24,every=8")
    setup = Setup(dataclasses.replace(method, policy=Redundancy(mix=mix, threshold=threshold)), dims_of(inputs))

    def transcribe(row: Row) -> Trace:
        return rkv(
            row,
            budget=24,
            every=8,
            window=8,
            mix=mix,
            kernel=7,
            group="max of logits",
            threshold=threshold,
            spare=1,
            spare_token_0=False,
            prompt_too=True,
        )

    check(setup, inputs, transcribe)


def test_rkv_of_a_short_prompt_first_fills_its_budget_and_the_slack() -> None:
    inputs = draw(3, (17, 3), padded=24, decoded=24, query_heads=2)
    result = run(Setup(parse("rkv:tokens=24,every=8"), dims_of(inputs)), inputs)
    counts = (np.asarray(result.held) >= 0).sum(-1)
    assert counts[:, 0, 0].tolist() == [*range(17, 32), *range(24, 32), 24, 25]
    assert counts[:, 1, 0].tolist() == list(range(3, 28))


def test_rkv_refuses_groups_of_different_size() -> None:
    inputs = draw(2, (64,), padded=64, decoded=2, query_heads=6)
    setup = Setup(parse("rkv:tokens=24,every=8"), dims_of(inputs), reads=(1, 0, 1, 1, 1, 0))
    with pytest.raises(UsageError, match="as many query heads"):
        run(setup, inputs)


def test_outputs_are_those_of_what_is_held() -> None:
    """The noise of Keyformer changes which tokens are held, not attention itself."""
    inputs = inputs_of(8)
    setup = Setup(parse("keyformer:tokens=88"), dims_of(inputs))
    result = run(setup, inputs)
    for b in range(4):
        row = inputs.row(b, setup)
        outputs = row.attention(row.tokens)[0]
        assert_outputs(result, b, Trace(outputs[: row.prompt], list(outputs[row.prompt :])))
