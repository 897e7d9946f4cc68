"""CriticalKV (Feng et al. 2025): half by any score, half by that score times the size of what the value adds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tests.oracles.choose import best


def projected_norms(values: np.ndarray, out_projection: np.ndarray, reads: Sequence[int]) -> np.ndarray:
    """values [P, K, H], out_projection [N, H, D] -> [K, P]: ‖W_O v_j‖₁, mean over the group's query heads."""
    norms = np.zeros((values.shape[1], len(values)))
    for n, h in enumerate(reads):
        for j, value in enumerate(values[:, h]):
            norms[h, j] += np.abs(value @ out_projection[n]).sum() / list(reads).count(h)
    return norms


def criticalkv_kept(
    scores: np.ndarray, norms: np.ndarray, *, capacity: int, first: float, epsilon: float
) -> tuple[list[list[int]], float]:
    """scores [K, P] of any method, norms [K, P] -> per kv head `capacity` kept positions, and the gap at the cuts.

    int(capacity · first) by score alone (first 0.5), the others by (score + epsilon) · norm (epsilon 1e-4).
    """
    kept, gaps = [], []
    for score, norm in zip(scores, norms, strict=True):
        by_score, gap = best(score, int(capacity * first))
        left = [p for p in range(len(score)) if p not in by_score]
        by_both, other_gap = best((score + epsilon) * norm, capacity - len(by_score), left)
        kept.append(sorted([*by_score, *by_both]))
        gaps += [gap, other_gap]
    return kept, min(gaps)
