"""The discrete key-value bottleneck in float64, one feature and one codebook at a time."""

from __future__ import annotations

import numpy as np


def fetch(features: np.ndarray, projections: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """int [B, C]: for each feature the nearest key of each codebook, by the distance itself."""
    index = np.zeros((len(features), len(keys)), int)
    for row, codebook in np.ndindex(*index.shape):
        h = features[row].astype(np.float64) @ projections[codebook]
        index[row, codebook] = np.argmin([((h - k) ** 2).sum() for k in keys[codebook].astype(np.float64)])
    return index


def logits(index: np.ndarray, values: np.ndarray) -> np.ndarray:
    """[B, V], the mean of the values [C, J, V] that were fetched."""
    return np.array([np.mean([values[c, j] for c, j in enumerate(row)], axis=0) for row in index])


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Softmax over the last axis."""
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def learn_keys(
    projections: np.ndarray,
    keys: np.ndarray,
    counts: np.ndarray,
    sums: np.ndarray,
    features: np.ndarray,
    drawn: np.ndarray,
    decay: float,
    threshold: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Keys, counts and sums after one batch; drawn [C, J] says which feature a dead key becomes."""
    index = fetch(features, projections, keys)
    keys, counts, sums = (np.array(x, np.float64) for x in (keys, counts, sums))
    for c, j in np.ndindex(*counts.shape):
        h = features.astype(np.float64) @ projections[c]
        mine = index[:, c] == j
        counts[c, j] = decay * counts[c, j] + (1 - decay) * mine.sum()
        sums[c, j] = decay * sums[c, j] + (1 - decay) * h[mine].sum(0)
        if counts[c, j] < threshold:
            counts[c, j] = threshold
            sums[c, j] = threshold * h[drawn[c, j]]
        keys[c, j] = sums[c, j] / counts[c, j]
    return keys, counts, sums
