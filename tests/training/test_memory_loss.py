"""The memory loss against its dense form in NumPy, and its gradient."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kvjax.attention import GroupedQuery, SelectiveAttention
from kvjax.cache.prompt import rotate
from kvjax.cache.step import Step
from kvjax.errors import UsageError
from kvjax.models.config import TransformerConfig
from kvjax.models.transformer import Transformer
from kvjax.training.data import FAMILIES
from kvjax.training.forward import OfTransformer
from kvjax.training.loss import Loss, NextToken
from kvjax.training.memory_loss import MemoryLoss, SoftCount, memory
from kvjax.training.step import make_step
from pallas_kernels.rope import Rope
from tests.oracles.selective import accumulated

B, T, N, K, H = 2, 14, 4, 2, 8
LENGTHS = (14, 9)
CONFIG = TransformerConfig(
    vocab_size=16,
    embed_dim=16,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    mlp_dim=16,
    max_positions=32,
    attention=SelectiveAttention(),
)

FORWARD = OfTransformer(Transformer(CONFIG))


def step_of(window: int | None = None) -> Step:
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((B, T, n, H)), jnp.float32) for n in (N, K, K))
    rope = Rope(jnp.asarray(100.0 ** (-np.arange(0, H, 2) / H), jnp.float32), jnp.float32(1))
    positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    valid = positions < jnp.asarray(LENGTHS)[:, None]
    return Step(q, k, v, positions, valid, rope, scale=0.2, window=window, selective=True)


def dense(step: Step, b: int, tau: float) -> np.ndarray:
    """M(n) of one row, f64 [n]: a T x T array of clamped differences."""
    count = LENGTHS[b]
    q, k = (np.asarray(rotate(step, x.swapaxes(1, 2))[b, 0, :count], np.float64) for x in (step.queries, step.keys))
    hidden = accumulated(q, k, step.scale, step.window)[:count]
    distance = np.arange(count)[:, None] - np.arange(count)
    sees = (distance >= 0) & (distance < (step.window or count))
    return np.where(sees, np.clip(1 - hidden / tau, 0, 1), 0).sum(-1)


@pytest.mark.parametrize(("window", "tau"), [(None, 1.0), (5, 0.3)])
def test_soft_counts_equal_the_dense_form(window: int | None, tau: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvjax.cache.hiding.CACHE_BYTES", 4 * B * T * 4)  # blocks of 4 queries, the last one padded
    step = step_of(window)
    out, counted = SoftCount(jnp.zeros(B, jnp.int32), tau).step(step)
    assert out.shape == (B, T, N, H)
    for b, count in enumerate(LENGTHS):
        expected = dense(step, b, tau)
        np.testing.assert_allclose(counted.counts[b, :count], expected, atol=1e-5)
        np.testing.assert_array_equal(counted.counts[b, count:], 0)
        assert expected.max() < count - 0.5, "nothing is hidden, so nothing is tested"
    by_row = [dense(step, b, tau).max() / count for b, count in enumerate(LENGTHS)]
    assert memory([counted, counted]) == pytest.approx(np.mean(by_row), rel=1e-5)
    doubled = dataclasses.replace(counted, counts=2 * counted.counts)
    assert memory([counted, doubled]) == pytest.approx(1.5 * np.mean(by_row), rel=1e-5)


def test_no_array_is_larger_than_a_block() -> None:
    """At 4096 tokens forward and backward hold no T x T array."""
    tokens = 4096
    shape = jax.ShapeDtypeStruct((1, tokens, 1, H), jnp.float32)

    def loss(q: jax.Array, k: jax.Array) -> jax.Array:
        positions = jnp.arange(tokens, dtype=jnp.int32)[None]
        step = Step(q, k, k, positions, positions >= 0, scale=0.2, selective=True)
        return SoftCount(jnp.zeros(1, jnp.int32)).step(step)[1].counts.max()

    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(shape, shape).compile()
    memory_of = compiled.memory_analysis()
    assert memory_of is not None and memory_of.temp_size_in_bytes < 4 * tokens * tokens / 2


def test_its_gradient_is_that_of_finite_differences() -> None:
    step, probe = step_of(), SoftCount(jnp.zeros(B, jnp.int32))

    def loss(q: jax.Array, k: jax.Array) -> jax.Array:
        return memory([probe.step(dataclasses.replace(step, queries=q, keys=k))[1]])

    grads = jax.jit(jax.grad(loss, (0, 1)))(step.queries, step.keys)
    assert np.abs(grads[0][:, :, 1:]).max() == 0, "only head 0 hides"
    rng = np.random.default_rng(1)
    for _ in range(4):
        way = [jnp.asarray(rng.standard_normal(x.shape), jnp.float32) for x in (step.queries, step.keys)]

        def at(move: float, way: Any = way) -> float:
            moved = dataclasses.replace(step, queries=step.queries + move * way[0], keys=step.keys + move * way[1])
            return float(np.mean([dense(moved, b, 1.0).max() / count for b, count in enumerate(LENGTHS)]))

        slope = sum(float(jnp.sum(g * one)) for g, one in zip(grads, way, strict=True))
        assert slope == pytest.approx((at(1e-3) - at(-1e-3)) / 2e-3, rel=0.02, abs=1e-3)


def batch_of(tokens: int = 12) -> dict[str, jax.Array]:
    rng = np.random.default_rng(2)
    kind = rng.integers(0, 3, (3, tokens))
    return {
        "tokens": jnp.asarray(rng.integers(0, 16, (3, tokens)), jnp.int32),
        "answer": jnp.asarray(kind == 1),
        "text": jnp.asarray(kind == 2),
        "family": jnp.asarray([0, len(FAMILIES) - 1, 0], jnp.int32),
    }


def value(loss: Loss, params: Any) -> float:
    return float(jax.jit(lambda p: loss(FORWARD, p, batch_of(), 0)[0])(params))


def initial() -> Any:
    return FORWARD.module.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]


def test_it_adds_its_share_to_the_loss() -> None:
    params, tokens = initial(), batch_of()["tokens"][:, :-1]
    _, layers = FORWARD.probed(params, tokens, (SoftCount(jnp.zeros(len(tokens), jnp.int32)),))
    share = float(memory(layers))
    assert 0 < share < 1
    assert value(MemoryLoss(2.0), params) == pytest.approx(value(NextToken(), params) + 2 * share, rel=1e-5)


@pytest.mark.slow
def test_training_lowers_it() -> None:
    params, loss = initial(), MemoryLoss(50.0)
    before = value(loss, params) - value(NextToken(), params)
    tx = optax.adam(1e-2)
    step, state = make_step(FORWARD, tx, loss), tx.init(params)
    for number in range(12):
        params, state, _ = step(params, state, batch_of(), number)
    assert value(loss, params) - value(NextToken(), params) < 0.9 * before


def test_it_needs_selective_attention() -> None:
    plain = OfTransformer(Transformer(dataclasses.replace(CONFIG, attention=GroupedQuery())))
    params = plain.module.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    with pytest.raises(UsageError, match="selective attention"):
        MemoryLoss(1.0)(plain, params, batch_of(), 0)
    with pytest.raises(UsageError, match="OfTransformer"):
        MemoryLoss(1.0)(lambda params, tokens: tokens, params, batch_of(), 0)
