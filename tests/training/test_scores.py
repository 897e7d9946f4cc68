"""Scores from forward passes equal plain greedy decoding and a slow sum of probabilities."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from kvjax.tasks import Example
from kvjax.training.scores import bits_per_byte, greedy, summary

V = 30
RNG = np.random.default_rng(0)
TABLE = RNG.normal(size=(V, V)).astype(np.float32)
MIX = RNG.normal(size=(V, V)).astype(np.float32)


def forward(params, tokens):
    """Logits that depend on the last token and on the mean of all tokens so far: causal, and easy to follow."""
    hot = jnp.eye(V)[tokens]
    mean = jnp.cumsum(hot, axis=1) / jnp.arange(1, tokens.shape[1] + 1)[None, :, None]
    return params * (hot @ TABLE + mean @ MIX)


def decode(tokens: list[int], count: int) -> list[int]:
    """One token at a time, in NumPy."""
    tokens = list(tokens)
    for _ in range(count):
        mean = np.bincount(tokens, minlength=V) / len(tokens)
        tokens.append(int(np.argmax(TABLE[tokens[-1]] + mean @ MIX)))
    return tokens[-count:]


def test_greedy_is_decoding_token_by_token():
    examples = []
    for i in range(11):
        context, question = RNG.integers(0, V, 9), RNG.integers(0, V, 2)
        truth = np.asarray(decode([*context, *question], 4))
        wrong_from = i % 5  # 4: all right
        answer = np.where(np.arange(4) < wrong_from, truth, (truth + 1) % V).astype(np.int32)
        examples.append(Example("t", context, question, answer, (1,) * 4, i / 11))
    generated = greedy(forward, jnp.float32(1.0), examples, batch=4)
    assert [g.tolist() for g in generated] == [decode([*e.context, *e.question], 4) for e in examples]
    report = summary(examples, generated)
    assert report["exact"] == round(2 / 11, 4) and report["count"] == 11
    by_depth = report["by_depth"]
    assert isinstance(by_depth, list) and by_depth[3] == 1.0 and by_depth[4] == 0.0


def test_bits_per_byte_is_the_mean_surprise():
    tokens, bytes_of, prefix = RNG.integers(0, V, 8 * 6 + 3), RNG.integers(1, 5, V), np.asarray([2])
    measured = bits_per_byte(forward, jnp.float32(0.3), tokens, bytes_of, length=6, prefix=prefix)
    bits = size = 0.0
    for start in range(0, 48, 6):
        row = [2]
        for token in tokens[start : start + 6]:
            mean = np.bincount(row, minlength=V) / len(row)
            logits = 0.3 * (TABLE[row[-1]] + mean @ MIX).astype(np.float64)
            bits -= (logits[token] - np.log(np.sum(np.exp(logits)))) / np.log(2)
            size += bytes_of[token]
            row.append(int(token))
    assert abs(measured - bits / size) < 1e-5
