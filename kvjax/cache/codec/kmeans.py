"""Fitting the codebooks of KVQuant (Hooper et al., 2024, arXiv:2401.18079): ranges, weighted k-means, Q-Norm. NumPy."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kvjax.cache.codec.nonuniform import NonUniform

Weighting = Literal["range", "plain"]
FloatArray = NDArray[np.float64]


CELLS = 1024
"""Even cells of the range of numbers in which first clusters are sought."""


def weighted_kmeans(x: ArrayLike, weights: ArrayLike, clusters: int, iterations: int = 50) -> FloatArray:
    """Centroids, rising, that minimise Σ weights · (x - nearest centroid)²: k-means in one dimension.

    In one dimension a cluster is a run of the sorted numbers, so that sums over it are differences of running sums.
    First come the best clusters of the numbers in `CELLS` cells, by dynamic programming; then Lloyd's iteration on the
    numbers themselves. The paper starts from random centroids, which can end far from the best. A cluster that loses
    all its weight keeps its centroid.

    Args:
      x, weights: of equal size; weights not negative, not all 0.
    """
    x, weights = (np.asarray(a, np.float64).ravel() for a in (x, weights))
    order = np.argsort(x, kind="stable")
    x, weights = x[order], weights[order]
    running = np.concatenate([[0.0], np.cumsum(weights)])
    moment = np.concatenate([[0.0], np.cumsum(weights * x)])

    def centroids_of(cuts: NDArray[np.intp], otherwise: FloatArray) -> FloatArray:
        mass = np.diff(running[cuts])
        return np.where(mass > 0, np.diff(moment[cuts]) / np.where(mass > 0, mass, 1.0), otherwise)

    cuts = _best_cuts(x, weights, clusters)
    centroids = np.sort(centroids_of(cuts, x[np.minimum(cuts[:-1], len(x) - 1)]))
    for _ in range(iterations):
        ends = np.searchsorted(x, 0.5 * (centroids[1:] + centroids[:-1]), side="right")
        moved = np.sort(centroids_of(np.concatenate([[0], ends, [len(x)]]), centroids))
        if np.array_equal(moved, centroids):
            break
        centroids = moved
    return centroids


def _best_cuts(x: FloatArray, weights: FloatArray, clusters: int) -> NDArray[np.intp]:
    """Where to cut sorted x into runs of least squared error, [clusters + 1], at the borders of cells."""
    borders = np.searchsorted(x, np.linspace(x[0], x[-1], CELLS + 1)[1:-1], side="right")
    borders = np.unique(np.concatenate([[0], borders, [len(x)]]))
    mass, one, two = (np.concatenate([[0.0], np.cumsum(a)])[borders] for a in (weights, weights * x, weights * x**2))
    m, a, b = (sums[None] - sums[:, None] for sums in (mass, one, two))  # [first, end]
    cost = np.where(m > 0, np.maximum(b - a**2 / np.where(m > 0, m, 1.0), 0.0), 0.0)
    cost[np.tril_indices(len(borders), -1)] = np.inf
    best, steps = cost[0], []
    for _ in range(clusters - 1):
        total = best[:, None] + cost
        steps.append(total.argmin(axis=0))
        best = total.min(axis=0)
    cuts = [len(borders) - 1]
    for step in reversed(steps):
        cuts.append(int(step[cuts[-1]]))
    return borders[[0, *reversed(cuts)]]


def matched_moments(table: FloatArray, x: FloatArray) -> FloatArray:
    """Q-Norm: the affine map of a codebook by which what decodes, of codes chosen before, has the moments of x."""
    rounded = table[np.searchsorted(0.5 * (table[1:] + table[:-1]), x, side="left")]
    factor = x.std() / max(rounded.std(), np.finfo(np.float32).tiny)
    return table * factor + x.mean() - rounded.mean() * factor


def fit_non_uniform(
    codec: NonUniform,
    x: ArrayLike,
    fisher: ArrayLike,
    *,
    weighting: Weighting = "range",
    match_moments: bool = False,
    iterations: int = 50,
) -> dict[str, NDArray[np.float32]]:
    """The parameters of a codec for one layer.

    Args:
      x: [tokens, K, H], keys (before rotary embedding) or values of calibration texts, without their first tokens.
      fisher: as x, the squared gradient of the language modelling loss with respect to x.
      weighting: 'range' weighs an element by fisher · s², s the width of its range, which is what the paper derives;
        'plain' by fisher alone, as its released code does.
      match_moments: whether levels are the codebook mapped by Q-Norm, which helps at 2 bits, or the codebook itself.

    Returns:
      What `NonUniform.parameter_shapes` says.
    """
    x, fisher = np.asarray(x, np.float64), np.asarray(fisher, np.float64)
    if codec.axis == "channel":
        low, high = (np.quantile(x, q, axis=0) for q in _shares(codec))
        offset, scale = 0.5 * (low + high), np.maximum(0.5 * (high - low), np.finfo(np.float32).tiny)
        normal, outlier = (x - offset) / scale, (x > high) | (x < low)
    else:
        vectors = x.reshape(len(x), 1, -1) if codec.joint else x
        low, high = (np.quantile(vectors, q, axis=-1, keepdims=True) for q in _shares(codec))
        outside = ((vectors >= high) | (vectors <= low)) & (codec.outliers > 0)
        inside = np.where(outside, np.median(vectors, axis=-1, keepdims=True), vectors)
        low, high = inside.min(-1, keepdims=True), inside.max(-1, keepdims=True)
        offset, scale = 0.5 * (low + high), np.maximum(0.5 * (high - low), np.finfo(np.float32).tiny)
        normal, outlier = ((vectors - offset) / scale).reshape(x.shape), outside.reshape(x.shape)
        scale = np.broadcast_to(scale, vectors.shape).reshape(x.shape)
    weights = fisher * (scale**2 if weighting == "range" else 1.0)
    weights, normal = np.broadcast_to(weights, x.shape)[~outlier], normal[~outlier]
    table = weighted_kmeans(normal, weights if weights.any() else np.ones_like(weights), 2**codec.bits, iterations)
    levels = matched_moments(table, normal) if match_moments else table
    fitted = {"codebook": table[None, None], "levels": levels[None, None]}
    if codec.axis == "channel":
        fitted |= {"scale": scale[None], "offset": offset[None]}
    return {name: np.asarray(value, np.float32) for name, value in fitted.items()}


def _shares(codec: NonUniform) -> tuple[float, float]:
    """The quantiles that end a range."""
    return codec.outliers / 2, 1 - codec.outliers / 2
