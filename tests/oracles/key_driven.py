"""Allotting query heads by key norms, one row and one head at a time, from the equations of arXiv 2408.08454."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def norms(keys: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """[B, K]: |K_g| over the valid tokens and the channels of keys [B, T, K, H]."""
    rows = [[np.linalg.norm(row[seen, g]) for g in range(row.shape[1])] for row, seen in zip(keys, valid, strict=True)]
    return np.array(rows)


def spread(m: np.ndarray) -> np.ndarray:
    """Min-max normalised; equal norms, where the release divides by zero, have equal shares."""
    return np.ones_like(m) if m.max() == m.min() else (m - m.min()) / (m.max() - m.min())


def counts(weights: np.ndarray, heads: int, least: int = 0) -> list[int]:
    """Rounded shares of the heads that are free, repaired at the largest or at the smallest until they add up."""
    free = heads - least * len(weights)
    share = weights / weights.sum() if weights.sum() else np.full(len(weights), 1 / len(weights))
    found = [round(float(free * s)) for s in share]  # Python rounds halves to even, as the release does
    while sum(found) > free:
        found[found.index(max(found))] -= 1
    while sum(found) < free:
        found[found.index(min(found))] += 1
    return [least + n for n in found]


def in_order(found: Sequence[int]) -> list[int]:
    """The kv head of each query head: the first n_1 read head 0, the next n_2 head 1."""
    return [g for g, n in enumerate(found) for _ in range(n)]


def moving(
    calls: Sequence[np.ndarray], kind: str, heads: int, window: int, least: int
) -> tuple[list[list[int]], np.ndarray]:
    """The map after each training call with norms m [K], and what is kept in the end; kind: "diff" or "ema"."""
    kept, found, size = np.zeros(len(calls[0])), [], heads // len(calls[0])
    reads = [n // size for n in range(heads)]
    for step, m in enumerate(calls):
        if step % window == 0:
            weights = np.abs(kept - m) if kind == "diff" else 0.9 * m + 0.1 * kept
            reads = in_order(counts(weights, heads, least))
            kept = (kept + m) / window
        found.append(reads)
    return found, kept


def noise(uniform: np.ndarray, out: np.ndarray) -> np.ndarray:
    """What the release subtracts from one group's output [rows, columns]: its rows standardised to the output's."""
    drawn = uniform.copy()
    for i in range(min(drawn.shape)):
        drawn[i, i] = 0
    result = np.empty_like(out)
    for i, row in enumerate(drawn):
        result[i] = (row - row.mean()) / row.std(ddof=1) * out[i].std(ddof=1) + out[i].mean()
    return result
