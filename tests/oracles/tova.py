"""TOVA (Oren et al. 2024): what the newest query looks at least goes; one choice for all heads of a layer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tests.oracles.row import Row, Trace


def layer_mean(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Per kv head the probabilities [G, S] of one query -> their mean [S] over all query heads of the layer."""
    return np.concatenate(rows).mean(axis=0)


def tova_scores(row: Row) -> np.ndarray:
    """[1, P]: the attention of the prompt's last query, mean over all query heads. The last token is not forced."""
    _, probabilities = row.attention(row.prompt)
    return layer_mean([p[:, -1] for p in probabilities])[None]


def tova_once(row: Row, *, capacity: int) -> Trace:
    """After the prompt the last token and the capacity - 1 best others stay (kvpress); decoded tokens stay."""
    trace = Trace(row.attention(row.prompt)[0])
    held = _prompt_best(row, trace, capacity)
    trace.kept.append([held] * row.kv_heads)
    for t in range(row.prompt, row.tokens):
        held = [*held, t]
        trace.outputs.append(row.attend_held(t, [held] * row.kv_heads)[0])
        trace.kept.append([held] * row.kv_heads)
    return trace


def tova(row: Row, *, capacity: int) -> Trace:
    """The same after the prompt, and again after every decoded token.

    A decoded token first reads everything held and itself; then, where more than `capacity` tokens are held, the one
    with the smallest attention of this query goes. The newest token never goes.
    """
    trace = Trace(row.attention(row.prompt)[0])
    held = _prompt_best(row, trace, capacity)
    trace.kept.append([held] * row.kv_heads)
    for t in range(row.prompt, row.tokens):
        held, output = _step(row, trace, held, t, capacity)
        trace.outputs.append(output)
        trace.kept.append([held] * row.kv_heads)
    return trace


def tova_streaming(row: Row, *, capacity: int) -> Trace:
    """The same from an empty cache: prompt tokens come one by one like decoded ones."""
    trace = Trace(np.zeros((row.prompt, *row.q.shape[1:])))
    held: list[int] = []
    for t in range(row.tokens):
        held, output = _step(row, trace, held, t, capacity)
        if t < row.prompt:
            trace.prompt_output[t] = output
        else:
            trace.outputs.append(output)
        if t >= row.prompt - 1:
            trace.kept.append([held] * row.kv_heads)
    return trace


def _prompt_best(row: Row, trace: Trace, capacity: int) -> list[int]:
    if row.prompt <= capacity:
        return list(range(row.prompt))
    scores = tova_scores(row)[0]
    others = trace.best({p: float(scores[p]) for p in range(row.prompt - 1)}, capacity - 1)
    return [*others, row.prompt - 1]


def _step(row: Row, trace: Trace, held: list[int], t: int, capacity: int) -> tuple[list[int], np.ndarray]:
    output, rows = row.attend_held(t, [[*held, t]] * row.kv_heads)
    if len(held) + 1 <= capacity:
        return [*held, t], output
    scores = layer_mean(rows)
    others = trace.best({p: float(score) for p, score in zip(held, scores, strict=False)}, capacity - 1)
    return [*others, t], output
