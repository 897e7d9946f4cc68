"""KVCrush (Jha et al. 2025): part of the budget goes to representatives of what would be evicted.

A reconstruction of the paper from summaries and two other implementations, neither of which builds the paper's
signatures of one bit per head. Unverified: which token of a bucket represents it, the first bit of the alternating
anchor, ties of the mean anchor, how a stride is rounded; each is an argument or named below.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from tests.oracles.choose import best


def signatures(scores: np.ndarray, places: int) -> np.ndarray:
    """scores [N, P] by head -> bits [P, N]: 1 where the token is among the head's `places` best.

    N: query heads or kv heads, whichever scores there are.
    """
    bits = np.zeros(scores.shape[::-1], int)
    for head, score in enumerate(scores):
        bits[best(score, places)[0], head] = 1
    return bits


def anchor(
    mode: Literal["random", "zeros", "ones", "mean", "alternating"],
    bits: np.ndarray,
    *,
    draws: np.ndarray | None,
    first: int,
) -> np.ndarray:
    """The anchor [N] for bits [P, N].

    random: `draws` [N] of 0 and 1. mean: the majority of each bit over all tokens of `bits`, 1 where more than half of
    them are. alternating: `first`, then the other, and so on.
    """
    heads = bits.shape[1]
    if mode == "random":
        assert draws is not None
        return draws
    if mode == "mean":
        return np.array([int(2 * bits[:, n].sum() > len(bits)) for n in range(heads)])
    if mode == "alternating":
        return np.array([first if n % 2 == 0 else 1 - first for n in range(heads)])
    return np.full(heads, int(mode == "ones"))


def distances(bits: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """bits [P, N], anchor [N] -> Hamming distances [P]."""
    return np.array([sum(int(a != b) for a, b in zip(token, reference, strict=True)) for token in bits])


def by_stride(
    distance: np.ndarray, candidates: list[int], places: int, *, ends: Literal["open", "closed"]
) -> list[int]:
    """`places` of the candidates, spread evenly over their order by distance (equal ones by position).

    open: the ones at floor(i · n / places); closed: at round(i · (n - 1) / (places - 1)), halves to even, from the
    first to the last (one place: the first).
    """
    order = sorted(candidates, key=lambda p: (distance[p], p))
    if places >= len(order):
        return sorted(order)
    if ends == "open":
        picked = [i * len(order) // places for i in range(places)]
    else:
        picked = [round(i * (len(order) - 1) / max(places - 1, 1)) for i in range(places)]
    return sorted(order[i] for i in picked)


def by_bucket(distance: np.ndarray, candidates: list[int], places: int, *, rank: np.ndarray) -> list[int]:
    """Candidates of one distance make a bucket. In turn, from the smallest distance to the largest, each bucket that
    has one left gives its token of the largest `rank` [P] (equal ones: the first), until there are `places`."""
    buckets = {
        d: sorted((p for p in candidates if distance[p] == d), key=lambda p: -rank[p]) for d in sorted(set(distance))
    }
    picked: list[int] = []
    while len(picked) < min(places, len(candidates)):
        for bucket in buckets.values():
            if bucket and len(picked) < places:
                picked.append(bucket.pop(0))
    return sorted(picked)


def kvcrush_kept(
    scores: np.ndarray,
    bits: np.ndarray,
    reference: np.ndarray,
    *,
    important: int,
    representatives: int,
    pick: Literal["stride open", "stride closed", "bucket"],
) -> tuple[list[list[int]], float]:
    """scores [K, P] of any method -> per kv head the `important` best and the representatives of the others.

    bits [P, N], reference [N]: signatures and anchor, the same for all kv heads; what is left over differs by kv head,
    and so may the representatives. One row of scores, [1, P], makes one choice for the layer. In a bucket the largest
    score represents. Also returns the gap at the cut of the important ones (a tie of bits has no gap).
    """
    distance = distances(bits, reference)
    kept, gaps = [], []
    for score in scores:
        chosen, gap = best(score, important)
        others = [p for p in range(len(score)) if p not in chosen]
        if pick == "bucket":
            extra = by_bucket(distance, others, representatives, rank=score)
        else:
            extra = by_stride(distance, others, representatives, ends="open" if pick == "stride open" else "closed")
        kept.append(sorted([*chosen, *extra]))
        gaps.append(gap)
    return kept, min(gaps)
