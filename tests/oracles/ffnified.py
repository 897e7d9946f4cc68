"""FFNified attention of one row in float64, one token at a time: queries, two depthwise convolutions, GELU between."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

Weights = Mapping[str, Mapping[str, np.ndarray]]

_gelu = np.vectorize(lambda x: 0.5 * x * (1.0 + math.erf(x / math.sqrt(2.0))))


def causal(x: np.ndarray, weights: Weights) -> np.ndarray:
    """x [T, D] to [T, D]; weights: query/kernel [D, D], key/kernel and value/kernel [k, D], and biases [D]."""
    queries = _queries(x, weights)
    return _before(_gelu(_before(queries, weights["key"])), weights["value"])


def _before(x: np.ndarray, weights: Mapping[str, np.ndarray]) -> np.ndarray:
    """The last entry of the kernel meets the token itself, the first the one k - 1 before it."""
    kernel = np.asarray(weights["kernel"], np.float64)
    out = np.zeros_like(x)
    for t in range(len(x)):
        for back in range(len(kernel)):
            if t - back >= 0:
                out[t] += kernel[len(kernel) - 1 - back] * x[t - back]
    return out + weights["bias"]


def grid(x: np.ndarray, weights: Weights, seen: np.ndarray, class_tokens: int) -> np.ndarray:
    """x [class_tokens + side * side, D] to the same shape; seen bool [side * side]; kernels [k, k, D]."""
    side = round(math.sqrt(len(x) - class_tokens))
    seen = seen.reshape(side, side, 1)
    queries = _queries(x[class_tokens:], weights).reshape(side, side, -1)
    coefficients = _gelu(_around(np.where(seen, queries, 0), weights["key"]))
    out = _around(np.where(seen, coefficients, 0), weights["value"]).reshape(side * side, -1)
    mean = out[seen.reshape(-1)].mean(0)
    return np.concatenate([np.repeat(mean[None], class_tokens, 0), out])


def _around(x: np.ndarray, weights: Mapping[str, np.ndarray]) -> np.ndarray:
    """The centre of the kernel meets the token itself; off the grid are zeros."""
    kernel = np.asarray(weights["kernel"], np.float64)
    side, reach = len(x), len(kernel) // 2
    out = np.zeros_like(x)
    for row, column, down, right in np.ndindex(side, side, len(kernel), len(kernel)):
        r, c = row + down - reach, column + right - reach
        if 0 <= r < side and 0 <= c < side:
            out[row, column] += kernel[down, right] * x[r, c]
    return out + weights["bias"]


def _queries(x: np.ndarray, weights: Weights) -> np.ndarray:
    return np.asarray(x, np.float64) @ weights["query"]["kernel"] + weights["query"]["bias"]
