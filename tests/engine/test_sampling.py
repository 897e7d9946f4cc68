"""Samplers against sets and probabilities written down from their definition."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.engine.sampling import Sampler
from kvjax.errors import UsageError

V, DRAWS = 12, 4000
LOGITS = np.random.default_rng(0).standard_normal(V).astype(np.float32) * 2


@functools.partial(jax.jit, static_argnums=0)
def draw(sampler: Sampler) -> jax.Array:
    return sampler.sample(jnp.broadcast_to(LOGITS, (DRAWS, V)), jax.random.key(1))


def expected(temperature: float, top_k: int | None, top_p: float | None) -> np.ndarray:
    """Probabilities float64 [V]: the k likeliest, then of those the fewest that reach p."""
    order = sorted(range(V), key=lambda i: -LOGITS[i])[: top_k or V]
    weights = np.array([np.exp(LOGITS[i] / temperature, dtype=np.float64) for i in order])
    weights /= weights.sum()
    if top_p is not None:
        count = next(n for n in range(1, len(order) + 1) if weights[:n].sum() >= min(top_p, weights.sum()))
        order, weights = order[:count], weights[:count]
    probabilities = np.zeros(V)
    probabilities[order] = weights / weights.sum()
    return probabilities


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(0.5, None, None), (3.0, 4, None), (1.0, None, 0.6), (2.0, 5, 0.8), (1.0, 99, 1.0)],
)
def test_draws_follow_the_definition(temperature: float, top_k: int | None, top_p: float | None) -> None:
    want = expected(temperature, top_k, top_p)
    found = np.bincount(draw(Sampler(temperature, top_k, top_p)), minlength=V) / DRAWS
    assert not found[want == 0].any(), "nothing outside of the set is ever drawn"
    assert np.abs(found - want).max() < 5 * np.sqrt(0.25 / DRAWS), "five standard deviations of the worst case"


@pytest.mark.parametrize("sampler", [Sampler(), Sampler(1.0, top_k=1), Sampler(1.0, top_p=1e-6), Sampler(1e-30)])
def test_these_are_greedy(sampler: Sampler) -> None:
    assert set(np.asarray(draw(sampler))) == {int(LOGITS.argmax())}


def test_rows_are_sampled_by_their_own_logits() -> None:
    logits = jnp.full((3, V), -1e9).at[jnp.arange(3), jnp.array([4, 0, 11])].set(0.0)
    assert list(jax.jit(Sampler(1.0, top_p=0.9).sample)(logits, jax.random.key(0))) == [4, 0, 11]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"temperature": -1}, "temperature is a finite number of at least 0"),
        ({"temperature": float("nan")}, "got nan"),
        ({"temperature": float("inf")}, "got inf"),
        ({"temperature": "1"}, "got '1'"),
        ({"top_k": 0}, "top_k is a whole number of at least 1"),
        ({"top_k": 2.5}, "got 2.5"),
        ({"top_p": 0}, r"top_p is in \(0, 1\]"),
        ({"top_p": 1.5}, "got 1.5"),
    ],
)
def test_what_cannot_be_sampled_is_refused(fields, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Sampler(**fields)
