"""Values of evicted tokens are merged into those of the tokens that follow them (CaM)."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.cache import methods
from kvjax.cache.budget import Uniform
from kvjax.cache.codec import Integer
from kvjax.cache.fate import Drop, Merge
from kvjax.cache.fate.merge import _added
from kvjax.cache.method import CacheMethod
from kvjax.cache.policy import AttentionMass, Recency
from kvjax.cache.policy.random import hash_uniform
from kvjax.errors import UsageError
from tests.cache.driver import Setup, dims_of, draw, run
from tests.cache.faithful import GROUPED, TOLERANCE, check, inputs_of
from tests.oracles.cam import cam, merge_probability, merged


def draws(seed: int, tokens: int) -> np.ndarray:
    """f32 [K, T], as the fate draws them in layer 0."""
    positions = jnp.arange(tokens, dtype=jnp.int32)[None, None]
    return np.asarray(hash_uniform(seed, jnp.arange(2, dtype=jnp.int32), positions))[0]


@GROUPED
@pytest.mark.parametrize("following", [4, pytest.param(9, marks=pytest.mark.slow)])
def test_tokens_that_are_evicted_while_decoding(query_heads: int, following: int) -> None:
    """Prompts that the budget of 24 holds; then one token is evicted at each step, from H2O's half of it."""
    inputs = draw(6, (22, 9), padded=22, decoded=30, query_heads=query_heads)
    setup = Setup(methods.cam(tokens=24, following=following, seed=3), dims_of(inputs))
    check(
        setup,
        inputs,
        lambda row: cam(
            row,
            sinks=0,
            recent=12,
            heavy=12,
            into=following,
            draws=draws(3, row.tokens),
            history="all",
            against="targets",
            prompt_merges=False,
        ),
    )
    dropped = dataclasses.replace(setup, method=dataclasses.replace(setup.method, fate=Drop()))
    assert np.abs(run(setup, inputs).outputs - run(dropped, inputs).outputs).max() > 1e-2


@GROUPED
@pytest.mark.parametrize("online", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_tokens_that_are_evicted_at_the_end_of_a_prompt(query_heads: int, online: bool) -> None:
    """Each gives its value to those of the next five that stay, as the prompt had it; sinks get nothing."""
    inputs = inputs_of(query_heads)
    method = CacheMethod(
        budget=Uniform(tokens_kept=24),
        policy=AttentionMass(),
        fate=Merge(following=5, seed=1),
        sinks=2,
        recent=8,
        every=1 if online else None,
    )
    only_prompt = dataclasses.replace(inputs, **{x: getattr(inputs, x)[:, :65] for x in "qkv"})
    setup = Setup(method, dims_of(only_prompt))
    result = run(setup, only_prompt)
    before = draws(1, 64)
    for b, prompt in enumerate(inputs.lengths):
        row = only_prompt.row(b, setup)
        _, probabilities = row.attention(prompt)
        held = [result.kept(0, b, head) for head in range(2)]
        values = []
        for head in range(2):
            mass, mine = probabilities[head].sum(axis=(0, 1)), {p: row.v[p, head] for p in range(prompt)}
            stay = dict(mine)
            for p in sorted(set(mine) - set(held[head])):
                after = [s for s in held[head] if s > p][:5]
                chance = merge_probability(mass[p], [mass[s] for s in after], against="targets")
                assert abs(chance - before[head, p]) > 1e-5
                given = {**stay, p: mine[p]}
                stay = merged(given, p, after if before[head, p] < chance else [])
            values.append(np.stack([stay[p] for p in held[head]]))
        # The token that is decoded next reads the values as they are now.
        own = row.v[prompt]
        query, keys = row.rotated[0][prompt], row.rotated[1]
        for n in range(query_heads):
            head = n * 2 // query_heads
            logits = keys[[*held[head], prompt], head] @ query[n] * query.shape[-1] ** -0.5
            weights = np.exp(logits - logits.max())
            expected = weights @ np.vstack([values[head], own[head]]) / weights.sum()
            np.testing.assert_allclose(result.outputs[0, b, n], expected, atol=TOLERANCE, rtol=0)


def test_sixteen_bit_values_take_what_they_are_given_in_float32() -> None:
    values = jnp.arange(24, dtype=jnp.bfloat16).reshape(1, 2, 3, 4)
    gift = jnp.full((1, 2, 1, 4), 0.3, jnp.float32)
    slot = jnp.array([[[2, 7], [-1, 0]]], jnp.int32)
    expected = np.asarray(values, np.float32)
    expected[0, 0, 2] += 0.3
    expected[0, 1, 0] += 0.3
    np.testing.assert_array_equal(_added(values, slot, gift), jnp.asarray(expected).astype(jnp.bfloat16))


def test_what_merging_needs() -> None:
    budget = Uniform(tokens_kept=24)
    with pytest.raises(UsageError, match="use exact values"):
        CacheMethod(budget=budget, policy=AttentionMass(), fate=Merge(), values=Integer(bits=8), recent=8, every=1)
    with pytest.raises(UsageError, match="Recency does not keep"):
        CacheMethod(budget=budget, policy=Recency(), fate=Merge(), recent=8, every=1)
    with pytest.raises(UsageError, match="token by token"):
        channel = Integer(bits=4, axis="channel", group=8)
        CacheMethod(budget=budget, policy=AttentionMass(), fate=Merge(), keys=channel, recent=8, every=8)
