"""Perplexity of windows, its bootstrap interval, and paired ratios."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.errors import UsageError
from kvjax.evaluation.text import Surprisal, perplexity, ratio, read_windows
from kvjax.models.language_model import LanguageModel
from tests.engine.driver import CONFIG, language_model

RNG = np.random.default_rng(0)


def surprisal(scale: float, noise: float = 1.0, windows: int = 60) -> Surprisal:
    tokens = np.full(windows, 100.0)
    return Surprisal(tokens * scale + noise * RNG.standard_normal(windows) * 10, tokens)


def test_windows_of_any_length() -> None:
    model = language_model()
    tokens = RNG.integers(0, CONFIG.vocab_size, (3, 10)).astype(np.int32)
    lengths = np.array([10, 4, 7], np.int32)
    read = read_windows(model, [(tokens[:2], lengths[:2]), (tokens[2:], lengths[2:])])
    assert read.tokens.tolist() == [9, 3, 6]
    everything = np.asarray(jax.jit(LanguageModel.apply)(model, jnp.asarray(tokens))[0], np.float64)
    for row, length in enumerate(lengths):
        logits = everything[row, :length]
        p = np.exp(logits - logits.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        expected = -np.log(p[np.arange(length - 1), tokens[row, 1:length]]).sum()
        np.testing.assert_allclose(read.nats[row], expected, rtol=1e-5)
    np.testing.assert_allclose(read.perplexity, math.exp(read.nats.sum() / 18))


def test_the_interval_is_that_of_a_mean() -> None:
    """Windows of one length: 1.96 standard errors of the mean of logarithms, nearly."""
    read = surprisal(2.0)
    found = perplexity(read)
    error = 1.96 * (read.nats / 100).std() / math.sqrt(60)
    np.testing.assert_allclose(
        [math.log(x) for x in (found.low, found.mean, found.high)],
        np.mean(read.nats / 100) + np.array([-error, 0, error]),
        atol=0.15 * error,
    )


def test_ratios_are_paired() -> None:
    """What both have in common cancels: intervals of two noisy readings overlap, that of their ratio excludes 1."""
    base = surprisal(2.0, noise=3.0)
    worse = Surprisal(base.nats + 2, base.tokens)
    assert not perplexity(worse).disjoint(perplexity(base))
    found = ratio(worse, base)
    np.testing.assert_allclose([found.low, found.mean, found.high], math.exp(0.02))
    assert ratio(base, base).mean == 1
    with pytest.raises(UsageError, match="same windows"):
        ratio(base, surprisal(2.0, windows=59))
