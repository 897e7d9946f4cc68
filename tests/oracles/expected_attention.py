"""Expected Attention (Devoto et al. 2025): the attention that the next queries would give, were they Gaussian."""

from __future__ import annotations

import numpy as np

from tests.oracles.attention import contiguous
from tests.oracles.rotary import rotate
from tests.oracles.row import Row


def query_statistics(row: Row, *, skip: int) -> tuple[np.ndarray, np.ndarray]:
    """Of the prompt's queries before rotary embedding, the `skip` first left out: mean [N, H], covariance [N, H, H].

    The covariance divides by the number of queries.
    """
    queries = row.q[skip : row.prompt]
    mean = queries.mean(axis=0)
    covariance = np.zeros((*mean.shape, mean.shape[-1]))
    for query in queries:
        for n, off in enumerate(query - mean):
            covariance[n] += np.outer(off, off) / len(queries)
    return mean, covariance


def mean_rotation(size: int, positions: range, theta: float) -> np.ndarray:
    """[H, H]: the mean of the matrices that rotary embedding multiplies (column) vectors with at `positions`."""
    # rotate() turns the rows of the identity: row i is the image of unit vector i, so the matrix is the transpose
    return np.mean([rotate(np.eye(size), float(p), theta).T for p in positions], axis=0)


def expected_attention_scores(
    row: Row,
    mean: np.ndarray,
    covariance: np.ndarray | None,
    *,
    sinks: int,
    future: int,
    epsilon: float,
    value_norm: bool,
    sink_bonus: float,
) -> np.ndarray:
    """[K, P]. mean [N, H], covariance [N, H, H] of queries before rotary embedding: of this prompt
    (`query_statistics`) or of other text; no covariance: the first-order variant.

    With the mean rotation R of the `future` positions after the prompt, m = R mean and C = R covariance Rᵀ:
    z_j = m·k_j / √H + k_jᵀ C k_j / (2H) with rotated keys, s = softmax of z over the prompt without the sinks, mean
    over the group, then (s + epsilon) · ‖v_j‖₂ (with `value_norm`). Sinks get the layer's largest score plus
    sink_bonus (1 by the specification, 0 in kvpress).
    """
    size = row.q.shape[-1]
    rotation = mean_rotation(size, range(row.prompt, row.prompt + future), row.theta)
    reads = row.reads or contiguous(row.q.shape[1], row.kv_heads)
    keys = row.rotated[1][: row.prompt]
    scores = np.zeros((row.kv_heads, row.prompt))
    for n, h in enumerate(reads):
        turned_mean = rotation @ mean[n]
        z = np.zeros(row.prompt - sinks)
        for j in range(sinks, row.prompt):
            key = keys[j, h]
            z[j - sinks] = turned_mean @ key / np.sqrt(size)
            if covariance is not None:
                turned_covariance = rotation @ covariance[n] @ rotation.T
                z[j - sinks] += key @ turned_covariance @ key / (2 * size)
        weights = np.exp(z - z.max())
        scores[h, sinks:] += weights / weights.sum() / reads.count(h)
    if value_norm:
        for h in range(row.kv_heads):
            for j in range(sinks, row.prompt):
                scores[h, j] = (scores[h, j] + epsilon) * np.linalg.norm(row.v[j, h])
    scores[:, :sinks] = scores[:, sinks:].max() + sink_bonus
    return scores
