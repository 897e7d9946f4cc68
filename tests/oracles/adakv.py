"""Ada-KV (Feng et al. 2024): the heads of a layer share one budget; where the scores are high more is kept."""

from __future__ import annotations

import numpy as np

from tests.oracles.choose import best


def adakv_kept(scores: np.ndarray, *, capacity: int, safeguard: float) -> tuple[list[list[int]], float]:
    """scores [K, S] of any method -> per kv head the kept indices, K · capacity in all; and the gap at the cuts.

    Each head first keeps the floor(safeguard · capacity) best of its own; the rest of the budget goes to the best of
    what is left, all heads together (kvpress; safeguard 0.2). Tokens to be forced have the highest scores.
    """
    heads, tokens = scores.shape
    safe, gaps = [], []
    for head in scores:
        own, gap = best(head, int(capacity * safeguard))
        safe.append(own)
        gaps.append(gap)
    left = [h * tokens + s for h in range(heads) for s in range(tokens) if s not in safe[h]]
    chosen, gap = best(scores.reshape(-1), heads * capacity - sum(map(len, safe)), left)
    kept = [sorted([*safe[h], *(c - h * tokens for c in chosen if c // tokens == h)]) for h in range(heads)]
    # a head that gets more than its safeguard keeps what the safeguard's cut left out next
    return kept, min([gap, *(own for h, own in enumerate(gaps) if len(kept[h]) == len(safe[h]))])


def adakv_budgets_factory(scores: np.ndarray, *, capacity: int, floor: float, weighted: bool) -> np.ndarray:
    """The integer form of the authors' public code: how many of scores [K, S] each kv head keeps, [K]; each then keeps
    the best of its own.

    count[k]: how many of head k's tokens are among the K · capacity best of the layer. The budget is
    round(count · (1 - floor) + floor(floor · capacity)), halves to even; the sum may miss K · capacity by rounding.
    weighted: before heads are compared, the scores of a head are multiplied by the share that its `capacity` best have
    of all its score. capacity: without the window, which is kept besides.
    """
    heads, tokens = scores.shape
    compared = scores.astype(float).copy()
    if weighted:
        for h in range(heads):
            order = np.sort(scores[h])[::-1]
            compared[h] *= order[:capacity].sum() / order.sum()
    chosen, _ = best(compared.reshape(-1), heads * capacity)
    counts = np.array([sum(c // tokens == h for c in chosen) for h in range(heads)])
    return np.round(counts * (1 - floor) + int(capacity * floor)).astype(int)
