"""KVQuant's codebooks: k-means in one dimension, weighted by sensitivity, and Q-Norm."""

from __future__ import annotations

import numpy as np


def fit_weights(fisher: np.ndarray, reach: np.ndarray, *, squared_reach: bool) -> np.ndarray:
    """The weight of each number: fisher F = (∂L/∂x)² times s², s the reach of its vector (broadcasts).

    Minimising Σ F (s · (x̂ - c))² asks for F · s² (the paper's derivation); the released code takes F alone.
    """
    return fisher * np.broadcast_to(reach, fisher.shape) ** 2 if squared_reach else fisher.copy()


def weighted_loss(x: np.ndarray, weights: np.ndarray, codebook: np.ndarray) -> float:
    """Σ weight · (distance to the nearest centroid)², over x [n]."""
    nearest = codebook[np.abs(x[:, None] - codebook).argmin(axis=1)]
    return float((weights * (x - nearest) ** 2).sum())


def weighted_kmeans(x: np.ndarray, weights: np.ndarray, start: np.ndarray, *, iterations: int) -> np.ndarray:
    """Lloyd's iterations from centroids `start` [C] over x [n] (no outliers among them): sorted centroids [C].

    Ends when nothing changes, or after `iterations`. A centroid without weight stays where it is.
    """
    centroids = np.sort(start.astype(np.float64))
    for _ in range(iterations):
        nearest = np.abs(x[:, None] - centroids).argmin(axis=1)
        moved = centroids.copy()
        for c in range(len(centroids)):
            own = nearest == c
            if weights[own].sum() > 0:
                moved[c] = (weights[own] * x[own]).sum() / weights[own].sum()
        if np.array_equal(moved, centroids):
            break
        centroids = np.sort(moved)
    return centroids


def best_codebook(x: np.ndarray, weights: np.ndarray, size: int) -> np.ndarray:
    """The `size` centroids with the smallest weighted loss of all, by dynamic programming over sorted x [n].

    A measure of how good a fit by iterations is; the paper has iterations only. Takes n² · size steps.
    """
    order = np.argsort(x, kind="stable")
    x, weights = x[order], np.maximum(weights[order], 1e-300)
    sums = [np.concatenate([[0.0], np.cumsum(weights * x**power)]) for power in range(3)]

    def cost(first: int, end: int) -> float:
        weight, one, two = (s[end] - s[first] for s in sums)
        return float(max(two - one**2 / weight, 0.0))

    n = len(x)
    best = np.full((size + 1, n + 1), np.inf)
    cut = np.zeros((size + 1, n + 1), int)
    best[0, 0] = 0.0
    for clusters in range(1, size + 1):
        for end in range(clusters, n + 1):
            for first in range(clusters - 1, end):
                loss = best[clusters - 1, first] + cost(first, end)
                if loss < best[clusters, end]:
                    best[clusters, end], cut[clusters, end] = loss, first
    centroids, end = [], n
    for clusters in range(size, 0, -1):
        first = cut[clusters, end]
        centroids.append((weights[first:end] * x[first:end]).sum() / weights[first:end].sum())
        end = first
    return np.array(centroids[::-1])


def q_norm(x: np.ndarray, codebook: np.ndarray) -> tuple[float, float]:
    """(scale, offset) by which rounding x [n], no outliers among it, keeps its mean and standard deviation.

    scale = σ1 / σ2, offset = μ1 - μ2 · scale, 1 of x and 2 of the rounded x. Dropped from the final paper.
    """
    rounded = codebook[np.abs(x[:, None] - codebook).argmin(axis=1)]
    scale = float(x.std() / rounded.std())
    return scale, float(x.mean() - rounded.mean() * scale)


def q_normalised(x: np.ndarray, codebook: np.ndarray) -> np.ndarray:
    """codebook · scale + offset: what codes are looked up in. Codes themselves are chosen before (`encode`)."""
    scale, offset = q_norm(x, codebook)
    return codebook * scale + offset
