"""How far the heads of a model with ALiBi can see, which their weights say (RazorAttention's rule for such models).

ALiBi (Press et al., 2022, arXiv:2108.12409) subtracts slope · distance from logits. Where |q·k · scale| <= C for all
queries and keys of a head, the tokens at a distance of w or more get together at most

    e^C · sum over d >= w of e^(-slope·d)  /  (e^-C · sum over all d of e^(-slope·d))  <=  e^(2C - slope·w)

of a query's attention, however many there are. So a window of (2C - log epsilon) / slope tokens, the query's own
included, leaves out less than epsilon. RazorAttention (Tang et al., 2024, arXiv:2407.15891) bounds C by
|W_Q W_K^T| (|gamma|² + |beta|²), as far as we know it; that holds for normalised inputs whose components are at most 1,
and `largest_logit` for all. The models of kvjax have rotary embedding; this is for those that bring ALiBi along.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kvjax.cache.budget import Budget, Full, HeadTable, Uniform
from kvjax.cache.layout import ceil_to
from kvjax.errors import UsageError

Floats = NDArray[np.float64]


def slopes(heads: int) -> Floats:
    """f64 [N]: 2^(-8/n), 2^(-16/n), … for n heads where that is a power of two.

    For other numbers those of the next smaller power of two, then every other one of the next larger (the authors'
    code).
    """
    if heads < 1:
        raise UsageError(f"a model has at least one head; got {heads}")
    power = 1 << (heads.bit_length() - 1)
    first = 2.0 ** (-8.0 * np.arange(1, power + 1) / power)
    between = 2.0 ** (-4.0 * np.arange(1, 2 * (heads - power), 2) / power)
    return np.concatenate([first, between])


def largest_logit(
    queries: ArrayLike, keys: ArrayLike, gain: ArrayLike, offset: ArrayLike | None = None, *, scale: float
) -> float:
    """C of one head: the largest |q·k · scale| of inputs that a norm made, whatever was normalised.

    Args:
      queries, keys: projections [D, H] of the head.
      gain, offset: gamma and beta [D] of the LayerNorm (or RMS norm, without offset) in front: inputs are
        gamma · n + beta with |n|² <= D.
      scale: multiplies q·k.
    """
    queries, keys, gain = (np.asarray(x, np.float64) for x in (queries, keys, gain))
    longest = math.sqrt(len(gain)) * np.abs(gain).max()
    longest += 0.0 if offset is None else np.linalg.norm(np.asarray(offset, np.float64))
    # |W_Q W_K^T| by way of two small triangles: the singular values are those of R_Q R_K^T.
    q, k = (np.asarray(np.linalg.qr(x, mode="r")) for x in (queries, keys))
    return float(scale * np.linalg.norm(q @ k.T, ord=2) * longest**2)


def windows(largest: ArrayLike, slope: ArrayLike, epsilon: float = 1e-3) -> NDArray[np.int64]:
    """int64, tokens (the query's own included) outside of which a head gives less than `epsilon` of its attention.

    Args:
      largest: C of every query head; slope: of every query head; they broadcast. epsilon: 1e-3 in the paper.

    Raises:
      UsageError: epsilon is not between 0 and 1, a slope not above 0, or a bound below 0.
    """
    largest, slope = np.asarray(largest, np.float64), np.asarray(slope, np.float64)
    if not 0 < epsilon < 1 or not (slope > 0).all() or not (largest >= 0).all():
        raise UsageError("windows take 0 < epsilon < 1, slopes above 0, and bounds of at least 0")
    return np.floor((2 * largest - np.log(epsilon)) / slope).astype(np.int64) + 1


def head_table(
    reach: ArrayLike, *, longest: int, kv_head_of_query: tuple[int, ...] | None = None, multiple: int = 64
) -> HeadTable:
    """The budgets of all heads: a head keeps its window, or everything where that is as long as a text can be.

    It goes with `CacheMethod(policy=Recency(), recent=1, every=1, …)`, which keeps the newest tokens of every head.

    Args:
      reach: int [L, N], `windows` of every query head; a kv head keeps the longest of those that read it.
      longest: tokens of the longest text.
      kv_head_of_query: for each of the N query heads its kv head; None: every query head has its own.
      multiple: windows are rounded up to multiples of it, for heads with the same window share a cache.
    """
    reach = np.asarray(reach, np.int64)
    reads = np.arange(reach.shape[1]) if kv_head_of_query is None else np.asarray(kv_head_of_query)
    kept = np.stack([reach[:, reads == head].max(axis=1) for head in range(reads.max() + 1)], axis=1)
    sizes = [[ceil_to(int(tokens), multiple) for tokens in layer] for layer in kept]
    different = sorted({size for layer in sizes for size in layer if size < longest})
    budgets: tuple[Budget, ...] = (Full(), *(Uniform(tokens_kept=size) for size in different))
    places = {size: place for place, size in enumerate(different, start=1)}
    return HeadTable(budgets, tuple(tuple(places.get(size, 0) for size in layer) for layer in sizes))
