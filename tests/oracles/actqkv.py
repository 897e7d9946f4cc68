"""ActQKV (Xiao et al. 2025): a probe query per window retrieves blocks; layers with a sharp view retrieve fewer.

A design reconstruction: only the abstract and summaries were at hand, so every equation here is unverified. Public
summaries only confirm that the activation bias is a distance of a token from the mean of its window, that the probe
emphasises tokens of large bias, and that the cut-off per layer follows the information density.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from tests.oracles.choose import best, largest_remainders


def activation_bias(queries: np.ndarray, kind: Literal["norm", "z-score"]) -> np.ndarray:
    """queries [m, H] of one window, head and layer -> [m].

    norm: ‖q_i‖₂ divided by the window's mean norm, minus 1. z-score: |q_ic - mean_c| / std_c, mean over channels
    (standard deviation with division by m; the absolute value is a choice, without it the mean says little).
    """
    if kind == "norm":
        norms = np.array([np.linalg.norm(query) for query in queries])
        return norms / norms.mean() - 1
    mean, deviation = queries.mean(axis=0), queries.std(axis=0)
    return np.array([np.mean(np.abs(query - mean) / deviation) for query in queries])


def probe(queries: np.ndarray, bias: np.ndarray, *, anchors: int | None) -> np.ndarray:
    """queries [m, H], bias [m] -> the probe query [H].

    The mean of the queries weighted by softmax(bias); with `anchors` the plain mean of the queries with the largest
    biases; with anchors = m the mean of all, the baseline.
    """
    if anchors is not None:
        return queries[best(bias, anchors)[0]].mean(axis=0)
    weights = np.exp(bias - bias.max())
    return weights @ queries / weights.sum()


def block_keys(keys: np.ndarray, block: int) -> np.ndarray:
    """keys [S, H] -> the mean key of each block [M, H]; the last block may be short."""
    return np.stack([keys[start : start + block].mean(axis=0) for start in range(0, len(keys), block)])


def block_scores(query: np.ndarray, representatives: np.ndarray) -> np.ndarray:
    """[M]: query·representative, unscaled."""
    return representatives @ query


def retrieved(scores: np.ndarray, places: int) -> tuple[list[int], float]:
    """scores [M] -> the best blocks, and the gap at the cut."""
    return best(scores, places)


def entropy(scores: np.ndarray) -> float:
    """Of softmax(scores [M]), in nats: high where a layer's view is diffuse."""
    weights = np.exp(scores - scores.max())
    shares = weights / weights.sum()
    return float(-sum(p * np.log(p) for p in shares if p > 0))


def cutoffs(entropies: np.ndarray, *, total: int) -> np.ndarray:
    """entropies [L] -> blocks per layer [L], in proportion to the entropy, `total` = L · budget in all (largest
    remainders). A sum of 0 gives every layer the same."""
    shares = entropies if entropies.sum() > 0 else np.ones(len(entropies))
    return largest_remainders(shares * (total / shares.sum()), total)


def cutoff_by_mass(scores: np.ndarray, share: float) -> int:
    """The other form: the fewest best blocks whose softmax mass is at least `share`."""
    weights = np.sort(np.exp(scores - scores.max()))[::-1]
    mass = np.cumsum(weights / weights.sum())
    return next((n + 1 for n, sum_n in enumerate(mass) if sum_n >= share), len(scores))


def cutoffs_over_windows(scores: Sequence[Sequence[np.ndarray]], *, budget: int) -> np.ndarray:
    """scores[w][l] [M_w] of window w's probe in layer l -> blocks [W, L].

    A window is cut off by the entropies of the window before it, which all layers know by then; the first window, with
    nothing before it, gives every layer `budget`.
    """
    layers = len(scores[0])
    entropies = [np.array([entropy(layer) for layer in window]) for window in scores[:-1]]
    return np.stack([np.full(layers, budget), *(cutoffs(window, total=layers * budget) for window in entropies)])


def read_positions(blocks: Sequence[int], *, sinks: int, block: int, window: range, tokens: int) -> list[int]:
    """What the tokens of a window read, besides themselves causally: sinks, retrieved blocks, local window.

    blocks: of the tokens 0 .. tokens - 1, counted from token 0, so that sinks and window may be retrieved as well;
    every position appears once.
    """
    found = {p for m in blocks for p in range(m * block, min((m + 1) * block, tokens))}
    return sorted(found | set(range(min(sinks, tokens))) | set(window))
