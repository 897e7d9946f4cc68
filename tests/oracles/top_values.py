"""Sigma's selective loading of values (Lin et al. 2025): all keys are read, and the values of the best slots alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tests.oracles.attention import contiguous
from tests.oracles.choose import best
from tests.oracles.row import Row, Trace


def read_best(logits: np.ndarray, values: np.ndarray, count: int, *, over_all: bool) -> tuple[np.ndarray, float]:
    """One query: logits [S] and values [S, H] -> output [H], and the gap at the cut.

    The softmax is that of the `count` largest logits or, with over_all, of all of which the others are left out.
    """
    chosen, gap = best(logits, min(count, len(logits)))
    exponentials = np.exp(logits - logits.max())
    total = exponentials.sum() if over_all else sum(exponentials[s] for s in chosen)
    output = np.zeros(values.shape[-1])
    for s in chosen:
        output += exponentials[s] / total * values[s]
    return output, gap


def top_values(row: Row, held: Sequence[Sequence[Sequence[int]]], *, count: int, over_all: bool) -> Trace:
    """Decoding alone; the prompt is exact. held[i][h]: what kv head h holds when decoded token i comes, without it."""
    trace = Trace(row.attention(row.prompt)[0])
    reads = row.reads or contiguous(row.q.shape[1], row.kv_heads)
    q, k = row.rotated
    for t in range(row.prompt, row.tokens):
        output = np.zeros(row.q.shape[1:])
        for n, head in enumerate(reads):
            seen = [*held[t - row.prompt][head], t]
            seen = [p for p in seen if row.window is None or t - p < row.window]
            logits = k[seen, head] @ q[t, n] / np.sqrt(q.shape[-1])
            if row.softcap is not None:
                logits = row.softcap * np.tanh(logits / row.softcap)
            output[n], gap = read_best(logits, row.v[seen, head], count, over_all=over_all)
            trace.gap = min(trace.gap, gap)
        trace.outputs.append(output)
    return trace
