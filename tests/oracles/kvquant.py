"""KVQuant (Hooper et al. 2024, arXiv 2401.18079): codebooks, keys per channel before rotation, sparse outliers.

W = K · H, all kv heads of a layer side by side. Thresholds of keys are fixed by calibration, those of values are each
token's own. The policy for more outliers than fit is this project's (the paper's sparse structure grows as needed).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from tests.oracles.coded_attention import decode_over
from tests.oracles.rotary import rotate_each
from tests.oracles.rounding import Stored, bfloat16_nearest, bfloat16_up
from tests.oracles.row import Row

Affine = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
"""(lowest, highest) of some vectors -> (zero, reach) as stored: a number x becomes (x - zero) / reach."""


def plain_affine(lowest: np.ndarray, highest: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """zero = (highest + lowest) / 2, reach = (highest - lowest) / 2 (step 2 of the paper's method)."""
    return (highest + lowest) / 2, (highest - lowest) / 2


def covering_affine(lowest: np.ndarray, highest: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same in bfloat16: the nearest zero, and the smallest reach that takes [lowest, highest] into [-1, 1]."""
    zero = bfloat16_nearest((highest + lowest) / 2)
    return zero, bfloat16_up(np.maximum(highest - zero, zero - lowest))


def key_limits(keys: np.ndarray, *, outliers: float, exact_first: int) -> tuple[np.ndarray, np.ndarray]:
    """keys [sequences, T, W] before rotation -> the quantiles 1 - t and t of each channel [W], t = 1 - outliers / 2.

    The first `exact_first` tokens of each sequence do not count. Quantiles are interpolated linearly.
    """
    samples = keys[:, exact_first:].reshape(-1, keys.shape[-1])
    return np.quantile(samples, outliers / 2, axis=0), np.quantile(samples, 1 - outliers / 2, axis=0)


def key_outliers(keys: np.ndarray, zero: np.ndarray, reach: np.ndarray) -> np.ndarray:
    """keys [T, W], zero, reach [W] -> bool [T, W]: strictly beyond the limits, |x̂| > 1."""
    return np.abs(keys - zero) > reach


def value_outliers(values: np.ndarray, *, outliers: float) -> np.ndarray:
    """values [T, W] -> bool [T, W]: at or beyond the token's own quantiles over its W channels."""
    out = np.zeros(values.shape, bool)
    for token, line in enumerate(values):
        low, high = np.quantile(line, [outliers / 2, 1 - outliers / 2])
        out[token] = (line <= low) | (line >= high)
    return out


def value_outliers_by_count(values: np.ndarray, *, per_side: int) -> np.ndarray:
    """The released kernels' form: the `per_side` smallest and the `per_side` largest channels of each token."""
    out = np.zeros(values.shape, bool)
    for token, line in enumerate(values):
        order = np.argsort(line, kind="stable")
        out[token, order[:per_side]] = out[token, order[len(order) - per_side :]] = True
    return out


def value_limits(values: np.ndarray, outlier: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """values, outlier [T, W] -> the extremes [T] of each token without its outliers.

    The paper puts the token's median in the outliers' place first, which lies between the extremes of the others.
    """
    kept = [line[~mask] for line, mask in zip(values, outlier, strict=True)]
    return np.array([line.min() for line in kept]), np.array([line.max() for line in kept])


def normalised(x: np.ndarray, zero: np.ndarray, reach: np.ndarray) -> np.ndarray:
    """x̂ = (x - zero) / reach; 0 where there is no reach."""
    return np.where(reach == 0, 0.0, (x - zero) / np.where(reach == 0, 1.0, reach))


@dataclasses.dataclass(frozen=True)
class Encoded:
    """All [T, W]: codes, x̂, the distance by which the chosen centroid is nearer than the next, what decoding returns.

    kept: bool, outliers that are stored and replace what their code says. overflow: bool, outliers that found no
    place and are coded like the others, by the nearest centroid. gap: how clear the choice of `kept` was.
    """

    codes: np.ndarray
    x: np.ndarray
    margin: np.ndarray
    kept: np.ndarray
    overflow: np.ndarray
    decoded: np.ndarray
    gap: float


def encode(
    x: np.ndarray,
    outlier: np.ndarray,
    zero: np.ndarray,
    reach: np.ndarray,
    codebook: np.ndarray,
    *,
    decodes_with: np.ndarray,
    capacity: int,
    block: int,
    parts: int,
    stored: Stored,
) -> Encoded:
    """x, outlier [T, W]; zero, reach broadcast to [T, W]; codebook, decodes_with [2^b].

    Every `block` tokens and each of the `parts` equal parts of W (1: the layer, K: a kv head) have places for
    `capacity` outliers together; the ones with the largest |x̂| get them. `stored` makes of an outlier what is kept.
    decodes_with: the codebook that codes are looked up in, after Q-Norm another than the one that chose them.
    """
    scaled = normalised(x, zero, reach)
    distance = np.abs(scaled[..., None] - codebook)
    codes = distance.argmin(axis=-1)
    ordered = np.sort(distance, axis=-1)
    margin = ordered[..., 1] - ordered[..., 0] if len(codebook) > 1 else np.full(x.shape, np.inf)
    kept, gap, width = np.zeros(x.shape, bool), np.inf, x.shape[1] // parts
    for start in range(0, len(x), block):
        for part in range(parts):
            region = (slice(start, start + block), slice(part * width, (part + 1) * width))
            places = [(start + int(t), part * width + int(c)) for t, c in np.argwhere(outlier[region])]
            found = sorted(places, key=lambda place: -abs(scaled[place]))
            if 0 < capacity < len(found):
                last, lost = (abs(scaled[found[i]]) for i in (capacity - 1, capacity))
                gap = min(gap, (last - lost) / max(last, 1e-300))
            for place in found[:capacity]:
                kept[place] = True
    decoded = np.where(kept, stored(x), decodes_with[codes] * reach + zero)
    return Encoded(codes, scaled, margin, kept, outlier & ~kept, decoded, float(gap))


@dataclasses.dataclass(frozen=True)
class Form:
    """How keys or values are coded: the arguments of `encode` that do not depend on the numbers."""

    codebook: np.ndarray
    decodes_with: np.ndarray
    capacity: int
    block: int
    parts: int
    stored: Stored


@dataclasses.dataclass
class KvquantTrace:
    """prompt_output [P, N, H], an output [N, H] per decoded token; keys (before rotation), values of all T tokens."""

    prompt_output: np.ndarray
    outputs: list[np.ndarray]
    keys: Encoded
    values: Encoded


def kvquant(
    row: Row,
    *,
    keys: Form,
    key_zero: np.ndarray,
    key_reach: np.ndarray,
    values: Form,
    value_outlier: Callable[[np.ndarray], np.ndarray],
    value_affine: Affine,
    exact_first: int,
    own_coded: bool,
) -> KvquantTrace:
    """key_zero, key_reach [W] by calibration. The first `exact_first` tokens are exact, and prompt attention is.

    A decoded token reads keys that are decoded and only then rotated to their original positions. own_coded: it reads
    itself in coded form too, as in the released simulation, which has no window of exact tokens.
    """
    k, v = row.k.reshape(row.tokens, -1), row.v.reshape(row.tokens, -1)
    mask = key_outliers(k, key_zero, key_reach)
    coded_keys = _encode_after(k, mask, key_zero[None], key_reach[None], keys, exact_first)
    value_mask = value_outlier(v)
    zero, reach = value_affine(*value_limits(v, value_mask))
    coded_values = _encode_after(v, value_mask, zero[:, None], reach[:, None], values, exact_first)
    held_keys = rotate_each(coded_keys.decoded.reshape(row.k.shape), np.arange(row.tokens), row.theta)
    held_values = coded_values.decoded.reshape(row.v.shape)
    counts = [t + own_coded for t in range(row.prompt, row.tokens)]
    outputs = decode_over(row, held_keys, held_values, counts, counts)
    return KvquantTrace(row.attention(row.prompt)[0], outputs, coded_keys, coded_values)


def _encode_after(
    x: np.ndarray, outlier: np.ndarray, zero: np.ndarray, reach: np.ndarray, form: Form, exact_first: int
) -> Encoded:
    """`encode` of the tokens from `exact_first` on, with those before it put back as they were (codes -1)."""
    zero, reach = np.broadcast_to(zero, x.shape)[exact_first:], np.broadcast_to(reach, x.shape)[exact_first:]
    coded = encode(x[exact_first:], outlier[exact_first:], zero, reach, **vars(form))
    first, none = x[:exact_first], np.zeros((exact_first, x.shape[1]), bool)
    return Encoded(
        np.concatenate([np.full(first.shape, -1), coded.codes]),
        np.concatenate([np.zeros(first.shape), coded.x]),
        np.concatenate([np.full(first.shape, np.inf), coded.margin]),
        np.concatenate([none, coded.kept]),
        np.concatenate([none, coded.overflow]),
        np.concatenate([first, coded.decoded]),
        coded.gap,
    )
