"""Selective self-attention (Zhang et al. 2024): queries have a temperature by token and position, values a gate."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from tests.oracles.attention import contiguous
from tests.oracles.rotary import rotate_each


def gelu(x: np.ndarray) -> np.ndarray:
    return np.array([0.5 * e * (1 + math.erf(e / math.sqrt(2))) for e in x.ravel()]).reshape(x.shape)


def attend_with_temperature(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    temperature: Callable[[int], float],
    gate: Callable[[int], float],
    *,
    theta: float,
) -> np.ndarray:
    """One row: q [T, N, H], k and v [T, K, H] before rotary embedding -> [T, N, H].

    temperature: what all logits of the query with index i (position i + 1) are multiplied by. gate: of value j.
    """
    at = np.arange(len(q))
    q, k = rotate_each(q, at, theta), rotate_each(k, at, theta)
    out = np.zeros(q.shape)
    for n, head in enumerate(contiguous(q.shape[1], k.shape[1])):
        for i in at:
            logits = temperature(i) * (k[: i + 1, head] @ q[i, n]) / np.sqrt(q.shape[-1])
            weights = np.exp(logits - logits.max())
            for j in range(i + 1):
                out[i, n] += weights[j] / weights.sum() * gate(j) * v[j, head]
    return out
