"""ChunkKV (Liu et al. 2025): any scores, but whole chunks of neighbours stay or go."""

from __future__ import annotations

import numpy as np

from tests.oracles.choose import best


def chunk_means(scores: np.ndarray, chunk: int) -> np.ndarray:
    """scores [P] -> the mean of each `chunk` tokens [M]; the last chunk may be shorter and is divided by its length."""
    return np.array([scores[start : start + chunk].mean() for start in range(0, len(scores), chunk)])


def chunkkv_scores(scores: np.ndarray, *, chunk: int, shared: bool) -> np.ndarray:
    """scores [K, P] of any method -> every token gets the mean score of its chunk, [K, P].

    shared: first summed over the kv heads, one choice for the layer: [1, P] (kvpress; chunk 20).
    """
    if shared:
        scores = scores.sum(axis=0, keepdims=True)
    return np.stack([np.repeat(chunk_means(head, chunk), chunk)[: len(head)] for head in scores])


def chunkkv_kept(scores: np.ndarray, *, chunk: int, places: int, shared: bool) -> tuple[list[list[int]], float]:
    """Whole chunks, the `places` best of them (kvpress: max(1, int(M · kept share))): positions per kv head, [1] when
    `shared`, and the gap at the cut."""
    kept, gaps = [], []
    for head in scores.sum(axis=0, keepdims=True) if shared else scores:
        chosen, gap = best(chunk_means(head, chunk), places)
        kept.append([p for c in chosen for p in range(c * chunk, min((c + 1) * chunk, len(head)))])
        gaps.append(gap)
    return kept, min(gaps)
