"""What finders take from a layer's attention, and the pure functions behind them, against transcriptions."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.attention.rope import RopeConfig
from kvjax.cache.policy import Prompt
from kvjax.cache.prompt import attend_prompt
from kvjax.cache.step import Step
from kvjax.calibration.gates import Gated, full_heads, stream
from kvjax.calibration.importance import _inputs_and_targets, ridge_regression
from kvjax.calibration.lazy_layers import Ends
from kvjax.calibration.prefix_shares import _received, prefix_lengths
from kvjax.calibration.retrieval_heads import Echoes, choose_heads
from tests.oracles import duoattention, prefixkv, razorattention, simlayerkv
from tests.oracles.row import Row
from tests.oracles.streaming_llm import kept_after

HEADS = pytest.mark.parametrize("reads", [(0, 1, 2), (0, 0, 0, 0, 1, 1, 1, 1), (0, 1, 1)], ids=["G1", "G4", "uneven"])
OPTIONS = pytest.mark.parametrize(
    "options", [{}, pytest.param({"window": 9}, marks=pytest.mark.slow)], ids=["full", "window"]
)
DIM = 8


def drawn(reads: tuple[int, ...], tokens: int, **options: int) -> tuple[Row, Prompt]:
    """The same random layer for a transcription and for us; `tokens` of `pad` more exist."""
    rng, kv_heads = np.random.default_rng(3), max(reads) + 1
    q, k, v = (rng.standard_normal((tokens, n, DIM)).astype(np.float32) for n in (len(reads), kv_heads, kv_heads))
    row = Row(2 * q, k, v, prompt=tokens, reads=reads, **options)
    spare = ((0, 5), (0, 0), (0, 0))
    step = Step(
        queries=jnp.pad(2 * q, spare)[None],
        keys=jnp.pad(k, spare, constant_values=9.0)[None],
        values=jnp.pad(v, spare, constant_values=9.0)[None],
        positions=jnp.arange(tokens + 5, dtype=jnp.int32)[None],
        valid=(jnp.arange(tokens + 5) < tokens)[None],
        rope=RopeConfig(10_000.0).table(DIM, jnp.int32(tokens)),
        hidden=jnp.asarray(rng.standard_normal((1, tokens + 5, 6)), jnp.float32),
        scale=DIM**-0.5,
        kv_head_of_query=reads,
        **options,  # type: ignore[arg-type]
    )
    return row, Prompt(step, jnp.arange(kv_heads), log_sum_exp=attend_prompt(step)[1])


def grouped(attention: list[np.ndarray]) -> list[np.ndarray]:
    """Maps [T, T] of the query heads, in order (groups are contiguous)."""
    return list(np.concatenate(attention))


@HEADS
@pytest.mark.parametrize("first", [0, 1])
def test_echo_and_induction(reads, first, monkeypatch):
    """Blocks of queries that do not divide the text: the sums are the same."""
    monkeypatch.setattr("kvjax.calibration.retrieval_heads.MOST", 12 * 29 * 5)
    period, tokens = 7, 28 + first
    row, prompt = drawn(reads, tokens)
    step = jax.tree.map(lambda x: x[:, :tokens] if x.ndim > 1 else x, prompt.step)
    whole = Prompt(step, prompt.head_index, log_sum_exp=prompt.log_sum_exp[..., :tokens])
    got = np.asarray(Echoes(period, first)(whole))
    maps = grouped(row.attention(tokens)[1])
    for ours, score in zip(got, (razorattention.echo_score, razorattention.induction_score), strict=True):
        # The transcription's period begins at position 0; ours behind the tokens that come first.
        each = np.array([score(m[first:, first:], period=period, first=0, over="rows") for m in maps])
        expected = razorattention.group_max(each * (tokens - first) / tokens, reads)
        np.testing.assert_allclose(ours, expected, rtol=1e-4)


def test_the_best_heads_by_either_score():
    rng = np.random.default_rng(0)
    echo, induction = rng.random((2, 5, 4))
    for shares in ((0.1, 0.3), (0.05, 0.14)):
        expected = razorattention.retrieval_heads(echo, induction, echo_share=shares[0], induction_share=shares[1])
        np.testing.assert_array_equal(choose_heads(echo, induction, *shares), expected)
    assert choose_heads(echo, induction, 0.0, 0.001).sum() == 1, "a share that is not 0 chooses at least one head"


@HEADS
def test_attention_received_and_prefix_lengths(reads):
    row, prompt = drawn(reads, 24)
    got = np.asarray(_received(prompt))[0, :24]
    np.testing.assert_allclose(got / len(reads), prefixkv.prefixkv_scores(row)[0], rtol=1e-4)
    importance = np.random.default_rng(1).random((4, 50)) ** np.array([[1], [2], [4], [8]])
    for total in (20, 77, 140):
        expected, _ = prefixkv.bisected(importance, total=total, steps=40)
        got = prefix_lengths(importance, total)
        np.testing.assert_array_equal(got, expected)
        assert total - 4 <= got.sum() <= total and (np.diff(got) <= 0).all()


@HEADS
@OPTIONS
def test_attention_to_the_ends(reads, options):
    row, prompt = drawn(reads, 24, **options)
    for queries in (1, 4):
        expected = simlayerkv.ends_mass(row, sinks=3, recent=6, queries=queries, skip_queries=False)
        np.testing.assert_allclose(Ends(3, 6, queries)(prompt), [expected], rtol=1e-4)


@HEADS
@OPTIONS
def test_streaming_attention_and_gates(reads, options):
    row, prompt = drawn(reads, 20, **options)
    full, _ = row.attention(20)
    heads = range(row.kv_heads)
    expected = np.stack([row.attend_held(t, [kept_after(t + 1, 3 + 5, 3)] * len(heads))[0] for t in range(20)])
    np.testing.assert_allclose(stream(prompt.step, 3, 5)[0, :20], expected, atol=2e-5)
    gates = np.linspace(0.2, 0.9, len(heads)).astype(np.float32)
    got, _ = Gated(jnp.zeros(1, jnp.int32), jnp.asarray(gates), 3, 5).step(prompt.step)
    np.testing.assert_allclose(got[0, :20], duoattention.gated(full, expected, gates, reads), atol=2e-5)


def test_gates_are_differentiated_and_gradients_are_finite():
    _, prompt = drawn((0, 0, 1, 1), 20)

    def loss(gates: jax.Array, queries: jax.Array) -> jax.Array:
        step = dataclasses.replace(prompt.step, queries=queries)
        return jnp.sum(Gated(jnp.zeros(1, jnp.int32), gates, 3, 5).step(step)[0][:, :20] ** 2)

    gates = jnp.array([0.3, 0.8])
    for gradient in jax.grad(loss, argnums=(0, 1))(gates, prompt.step.queries):
        assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0
    drawn_gates = np.random.default_rng(0).random((4, 6)).astype(np.float32)
    for share in (0.25, 0.5):
        np.testing.assert_array_equal(full_heads(drawn_gates, share), duoattention.full_heads(drawn_gates, share=share))


@HEADS
def test_targets_of_the_network(reads):
    """The mean over the queries behind a token, of the largest attention in the group of each query."""
    row, prompt = drawn(reads, 24)
    _, targets = _inputs_and_targets(prompt)
    mass = np.stack([attention.max(axis=0).sum(axis=0) for attention in row.attention(24)[1]], axis=-1)
    expected = np.log(mass / (24 - np.arange(24))[:, None] + 1e-7)
    np.testing.assert_allclose(targets[0, :24], expected, atol=1e-4)


def test_ridge_regression():
    rng = np.random.default_rng(0)
    x, ridge = rng.normal(size=(200, 6)) + 3, 0.1
    y = x @ rng.normal(size=(6, 2)) + 5 + 0.1 * rng.normal(size=(200, 2))
    got = ridge_regression(x, y, ridge)
    middle = x - x.mean(0)
    penalty = np.sqrt(ridge * (middle**2).sum() / 6) * np.c_[np.eye(6), np.zeros(6)]
    expected = np.linalg.lstsq(np.r_[np.c_[x, np.ones(200)], penalty], np.r_[y, np.zeros((6, 2))])[0]
    np.testing.assert_allclose(got["kernel"][0], expected[:6].T, rtol=1e-4)
    np.testing.assert_allclose(got["bias"][0], expected[6], rtol=1e-4)
