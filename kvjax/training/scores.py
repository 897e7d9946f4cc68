"""Scores of a model with its full cache, from plain forward passes: what the model card states."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.tasks import Example, recall, score
from kvjax.training.step import Forward
from kvjax.typing import Array, PyTree


def greedy(forward: Forward, params: PyTree, examples: Iterable[Example], batch: int = 8) -> list[np.ndarray]:
    """What greedy decoding gives for each example: int32 [len(answer)] each. All examples have one total length.

    One forward pass scores every answer token behind the true ones before it. As long as all are right, that
    is greedy decoding; from the first wrong one on, the pass is repeated with what the model itself said.
    """
    predict = _predictor(forward)
    done: list[np.ndarray] = []
    examples = list(examples)
    for start in range(0, len(examples), batch):
        group = examples[start : start + batch]
        rows = np.stack([np.concatenate([e.context, e.question, e.answer]) for e in group])
        rows = np.pad(rows, ((0, batch - len(group)), (0, 0)), mode="edge")
        done += _settle(partial(predict, params), rows, len(group[0].answer))[: len(group)]
    return done


def _settle(predict: Callable[[Array], Array], rows: np.ndarray, size: int) -> list[np.ndarray]:
    """Repeats the pass until every row's last `size` tokens are the model's own greedy choice."""
    rows = rows.copy()
    for _ in range(size):
        said = np.asarray(predict(jnp.asarray(rows[:, :-1])))[:, -size:]
        wrong = said != rows[:, -size:]
        if not wrong.any():
            break
        first = np.where(wrong.any(1), wrong.argmax(1), size)
        settled = np.arange(size)[None] <= first[:, None]
        rows[:, -size:] = np.where(settled, said, rows[:, -size:])
    return list(rows[:, -size:])


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
