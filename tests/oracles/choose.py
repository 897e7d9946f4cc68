"""The best of some scores, with the gap at the cut."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from tests.oracles.row import Trace


def best(scores: np.ndarray, places: int, among: Iterable[int] | None = None) -> tuple[list[int], float]:
    """The `places` indices of scores [S] with the largest scores, ascending, and the gap of `Trace.best`.

    among: the indices that compete; None means all. Equal scores: the lowest index wins.
    """
    trace = Trace(np.zeros(0))
    candidates = range(len(scores)) if among is None else among
    chosen = trace.best({index: float(scores[index]) for index in candidates}, places)
    return chosen, trace.gap


def largest_remainders(shares: np.ndarray, total: int) -> np.ndarray:
    """Integers [L] with the sum `total`, each less than 1 away from shares [L] (of sum `total`).

    All are rounded down; what is missing goes to the largest fractions, among equal ones to the first.
    """
    counts = np.floor(shares + 1e-9).astype(int)
    order = sorted(range(len(shares)), key=lambda index: -(shares[index] - counts[index]))
    for index in order[: total - int(counts.sum())]:
        counts[index] += 1
    return counts
