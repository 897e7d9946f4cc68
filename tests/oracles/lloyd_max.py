"""The scalar quantiser with the smallest squared error for a density (Lloyd 1957, Max 1960)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np

Density = Callable[[np.ndarray], np.ndarray]

NODES, WEIGHTS = np.polynomial.legendre.leggauss(64)


def integral(function: Callable[[np.ndarray], np.ndarray], low: float, high: float, pieces: int = 16) -> float:
    """Gauss-Legendre on `pieces` equal parts of [low, high]."""
    edges = np.linspace(low, high, pieces + 1)
    total = 0.0
    for a, b in itertools.pairwise(edges):
        total += (b - a) / 2 * float((WEIGHTS * function((a + b) / 2 + (b - a) / 2 * NODES)).sum())
    return total


def normal_density(dim: int) -> tuple[Density, float, float]:
    """N(0, 1 / dim), and where it may be cut off."""
    sigma = 1 / math.sqrt(dim)
    return lambda x: np.exp(-(x**2) / (2 * sigma**2)) / (sigma * math.sqrt(2 * math.pi)), -10 * sigma, 10 * sigma


def sphere_density(dim: int) -> tuple[Density, float, float]:
    """One coordinate of a uniform point of the unit sphere in `dim` >= 3 dimensions (a Beta density on [-1, 1]).

    Γ(d/2) / (√π Γ((d-1)/2)) · (1 - x²)^((d-3)/2).
    """
    constant = math.exp(math.lgamma(dim / 2) - math.lgamma((dim - 1) / 2)) / math.sqrt(math.pi)
    return lambda x: constant * (1 - x**2) ** ((dim - 3) / 2), -1.0, 1.0


def angle_density(level: int) -> tuple[Density, float, float]:
    """The angle of two radii that are norms of 2^(level - 1) normal numbers each: ∝ sin(2ψ)^(2^(level-1) - 1).

    level >= 2, ψ in [0, π / 2].
    """
    power = 2 ** (level - 1) - 1
    mass = integral(lambda x: np.sin(2 * x) ** power, 0.0, math.pi / 2)
    return lambda x: np.sin(2 * x) ** power / mass, 0.0, math.pi / 2


def lloyd_max(density: Density, low: float, high: float, size: int, *, iterations: int) -> np.ndarray:
    """`size` centroids: each the mean of the density between the midpoints to its neighbours. Starts from quantiles."""
    grid = np.linspace(low, high, 20001)
    mass = np.cumsum(density((grid[1:] + grid[:-1]) / 2))
    centroids = np.interp((np.arange(size) + 0.5) / size, mass / mass[-1], (grid[1:] + grid[:-1]) / 2)
    for _ in range(iterations):
        edges = [low, *((centroids[1:] + centroids[:-1]) / 2), high]
        moved = [
            integral(lambda x: x * density(x), a, b) / integral(density, a, b) for a, b in itertools.pairwise(edges)
        ]
        change = np.abs(np.array(moved) - centroids).max()
        centroids = np.array(moved)
        if change < 1e-13 * (high - low):
            break
    return centroids


def mean_squared_error(density: Density, low: float, high: float, centroids: np.ndarray) -> float:
    """∫ (x - nearest centroid)² density(x) dx."""
    edges = [low, *((centroids[1:] + centroids[:-1]) / 2), high]
    cells = zip(centroids, edges[:-1], edges[1:], strict=True)
    return sum(integral(lambda x, c=c: (x - c) ** 2 * density(x), a, b) for c, a, b in cells)
