"""Scores of a model with its full cache, from plain forward passes: what the model card states."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.tasks import Example, recall, score
from kvjax.training.loss import Forward
from kvjax.typing import Array, PyTree


def greedy(forward: Forward, params: PyTree, examples: Iterable[Example], batch: int = 8) -> list[np.ndarray]:
    """What greedy decoding gives for each example: int32 [len(answer)] each. All examples have one total length.

    One forward pass scores every answer token behind the true ones before it. As long as all are right, that
    is greedy decoding; rows with a wrong one get further passes with what the model itself said up to there.
    """
    examples = list(examples)
    rows = np.stack([np.concatenate([e.context, e.question, e.answer]) for e in examples])
    size = len(examples[0].answer)
    predict = partial(_predictor(forward), params)
    pending = np.arange(len(rows))
    for _ in range(size):
        said = _batched(predict, rows[pending, :-1], batch)[:, -size:]
        wrong = said != rows[pending, -size:]
        first = np.where(wrong.any(1), wrong.argmax(1), size)
        settled = np.arange(size)[None] <= first[:, None]
        rows[pending, -size:] = np.where(settled, said, rows[pending, -size:])
        pending = pending[first < size - 1]
        if not len(pending):
            break
    return list(rows[:, -size:])


def _batched(predict: Callable[[Array], Array], rows: np.ndarray, batch: int) -> np.ndarray:
    """`predict` on a few rows at a time, always the same number."""
    padded = np.pad(rows, ((0, -len(rows) % batch), (0, 0)), mode="edge")
    parts = [np.asarray(predict(jnp.asarray(part))) for part in np.split(padded, len(padded) // batch)]
    return np.concatenate(parts)[: len(rows)]


def _predictor(forward: Forward) -> Callable[[PyTree, Array], Array]:
    return jax.jit(lambda params, tokens: jnp.argmax(forward(params, tokens), axis=-1))


def summary(examples: list[Example], generated: list[np.ndarray]) -> dict[str, object]:
    """Exact match, mean share of recalled items, the count, and exact match per depth decile (None where empty)."""
    exact = np.asarray([score(e, g) == 1.0 for e, g in zip(examples, generated, strict=True)])
    decile = np.asarray([min(int(e.depth * 10), 9) for e in examples])
    return {
        "exact": round(float(exact.mean()), 4),
        "recall": round(float(np.mean([recall(e, g) for e, g in zip(examples, generated, strict=True)])), 4),
        "count": len(examples),
        "by_depth": [round(float(exact[decile == d].mean()), 3) if (decile == d).any() else None for d in range(10)],
    }


def bits_per_byte(
    forward: Forward, params: PyTree, tokens: np.ndarray, bytes_of: np.ndarray, length: int, prefix: np.ndarray
) -> float:
    """Bits per byte of a text, int [n], in windows of `length` tokens that begin with `prefix` and do not overlap.

    `bytes_of` int [V]: UTF-8 bytes of each token. The rest that fills no window is left out.
    """

    @jax.jit
    def total_nats(params: PyTree, rows: Array) -> Array:
        logits = forward(params, rows[:, :-1])[:, len(prefix) - 1 :]
        targets = rows[:, len(prefix) :, None]
        return jnp.sum(jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, targets, axis=-1)[..., 0])

    body = length + 1 - len(prefix)
    windows = tokens[: len(tokens) // body * body].reshape(-1, body)
    rows = np.concatenate([np.tile(prefix, (len(windows), 1)), windows], axis=1).astype(np.int32)
    nats = sum(float(total_nats(params, jnp.asarray(rows[i : i + 8]))) for i in range(0, len(rows) - 7, 8))
    counted = windows[: len(windows) // 8 * 8]
    size = bytes_of[counted].sum()
    return nats / np.log(2) / float(size)
