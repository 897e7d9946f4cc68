"""Key norms as a training state, and noise on what heads read, against transcriptions."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.attention.allocation import key_norms
from kvjax.attention.bidirectional import Bidirectional
from kvjax.attention.moving_norms import Average, Difference, MovingNorms, Weighting, layer_maps
from kvjax.attention.perturbed import Perturbed, matched_noise
from kvjax.cache.prompt import attend_prompt
from kvjax.cache.step import Step
from tests.oracles import key_driven as oracle

B, T, N, K, H = 2, 5, 12, 3, 4


def step_of(seed: int) -> Step:
    rng = np.random.default_rng(seed)
    shapes = (B, T, N, H), (B, T, K, H), (B, T, K, H)
    q, keys, values = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    keys *= rng.uniform(0.2, 2.0, (K, 1)).astype(np.float32)
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    valid = np.arange(T) < np.array([[T], [3]])
    return Step(*(jnp.asarray(x) for x in (q, keys, values, positions, valid)), scale=0.5)


STEPS = [step_of(seed) for seed in range(7)]
NORMS = [oracle.norms(np.asarray(s.keys), np.asarray(s.valid)).sum(0) for s in STEPS]
run = jax.jit(lambda state, step: state.step(step))


@pytest.mark.parametrize("least", [0, 1])
@pytest.mark.parametrize(("rule", "kind"), [(Difference(), "diff"), (Average(), "ema")])
def test_training_moves_the_map_as_transcribed(rule: Weighting, kind: str, least: int) -> None:
    expected, kept = oracle.moving(NORMS, kind, N, 3, least)
    assert expected[0] == expected[2] and len({tuple(reads) for reads in expected}) > 1
    state = MovingNorms.start(rule, N, K, window=3, least=least)
    for step, reads in zip(STEPS, expected, strict=True):
        out, state = run(state, step)
        assert state.head_map.tolist() == reads
        given = dataclasses.replace(step, head_map=jnp.broadcast_to(jnp.int32(reads), (B, N)))
        np.testing.assert_allclose(out, attend_prompt(given)[0], atol=1e-6)
    np.testing.assert_allclose(state.kept, kept, rtol=1e-5)
    assert int(state.calls) == len(STEPS)


def test_a_frozen_state_stays_and_the_released_one_moves_at_evaluation() -> None:
    _, state = run(MovingNorms.start(Difference(), N, K, window=3, least=0), STEPS[0])
    _, still = run(state.frozen(), STEPS[1])
    np.testing.assert_array_equal(still.head_map, state.head_map)
    np.testing.assert_array_equal(still.kept, state.kept)
    always = dataclasses.replace(state, moves="always", kept=jnp.asarray(NORMS[0], jnp.float32))
    _, moved = run(always, STEPS[1])
    expected = oracle.in_order(oracle.counts(np.abs(NORMS[0] - NORMS[1]), N))
    assert moved.head_map.tolist() == expected != state.head_map.tolist()
    np.testing.assert_allclose(moved.kept, NORMS[1], rtol=1e-5)


def test_a_new_state_reads_in_equal_groups_and_maps_can_be_taken_out() -> None:
    state = MovingNorms.start(Average(), N, K)
    assert layer_maps([state, state]).maps == ((0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2),) * 2
    out, _ = run(state.frozen(), STEPS[0])
    np.testing.assert_allclose(out, attend_prompt(STEPS[0])[0], atol=1e-6)


def test_norms_give_no_gradient_and_padding_no_norm() -> None:
    step = STEPS[0]
    poisoned = dataclasses.replace(step, keys=jnp.where(step.valid[..., None, None], step.keys, jnp.nan))
    np.testing.assert_allclose(key_norms(poisoned).sum(0), NORMS[0], rtol=1e-5)
    slope = jax.grad(lambda keys: key_norms(dataclasses.replace(step, keys=keys)).sum())(jnp.zeros_like(step.keys))
    assert (slope == 0).all()


def test_noise_equals_the_transcription() -> None:
    key, out = jax.random.key(3), attend_prompt(step_of(0))[0]
    out = out + jnp.arange(N)[:, None]
    uniform = np.asarray(jax.random.uniform(key, (N, T * H)), np.float64)
    found = matched_noise(key, out, jnp.ones((B, T), bool), N // K)
    size = N // K
    for row in range(B):
        flat = np.asarray(out[row], np.float64).transpose(1, 0, 2).reshape(N, T * H)
        groups = [slice(g * size, (g + 1) * size) for g in range(K)]
        expected = np.concatenate([oracle.noise(uniform[g], flat[g]) for g in groups])
        np.testing.assert_allclose(found[row].transpose(1, 0, 2).reshape(N, T * H), expected, atol=1e-4)


def test_noise_depends_on_the_key_alone_and_not_on_padding() -> None:
    step = STEPS[0]
    out, after = run(Perturbed(jax.random.key(0), Bidirectional()), step)
    np.testing.assert_array_equal(out, run(Perturbed(jax.random.key(0), Bidirectional()), step)[0])
    again, _ = run(after, step)
    assert abs(np.asarray(again - out)).max() > 0.1, "the next call has other noise"
    plain = Bidirectional().step(step)[0]
    noise, seen = np.asarray(plain - out), np.asarray(step.valid)
    for row in range(B):
        mine, its = noise[row, seen[row]], np.asarray(plain)[row, seen[row]]
        np.testing.assert_allclose(mine.mean((0, 2)), its.mean((0, 2)), atol=1e-5)
        spread = [x.transpose(1, 0, 2).reshape(N, -1).std(1, ddof=1) for x in (mine, its)]
        np.testing.assert_allclose(spread[0], spread[1], rtol=1e-4)
