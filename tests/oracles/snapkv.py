"""SnapKV (Li et al. 2024): once, after the prompt, what its last queries looked at."""

from __future__ import annotations

import numpy as np

from tests.oracles.row import Row, Trace


def pooled(scores: np.ndarray, kernel: int) -> np.ndarray:
    """Mean over `kernel` neighbours, zeros beyond both ends counted: scores [S] -> [S]."""
    half = kernel // 2
    padded = np.concatenate([np.zeros(half), scores, np.zeros(half)])
    return np.array([padded[i : i + kernel].sum() / kernel for i in range(len(scores))])


def window_scores(probabilities: np.ndarray, window: int, kernel: int) -> np.ndarray:
    """One kv head's probabilities [G, P, P] of the prompt -> scores [P - window] of the tokens before the window.

    Mean over the window's queries, then the pool over those columns alone, then the mean over the group.
    """
    before = probabilities.shape[-1] - window
    per_query_head = probabilities[:, before:, :before].mean(axis=1)
    return np.mean([pooled(scores, kernel) for scores in per_query_head], axis=0)


def snapkv(row: Row, *, capacity: int, window: int, kernel: int) -> Trace:
    """Keep the window and the capacity - window best others; what is decoded later stays.

    A prompt of at most `capacity` tokens is left whole.
    """
    output, probabilities = row.attention(row.prompt)
    trace = Trace(output)
    before = row.prompt - window
    if row.prompt <= capacity:
        kept = [list(range(row.prompt))] * row.kv_heads
    else:
        scores = [window_scores(p, window, kernel) for p in probabilities]
        chosen = [trace.best(dict(enumerate(head)), capacity - window) for head in scores]
        kept = [[*positions, *range(before, row.prompt)] for positions in chosen]
    trace.kept.append(kept)
    for t in range(row.prompt, row.tokens):
        kept = [[*positions, t] for positions in kept]
        trace.outputs.append(row.attend_held(t, kept)[0])
        trace.kept.append(kept)
    return trace
