"""CSKV (Wang et al. 2024, arXiv 2409.10593): low-rank latents of all tokens and the exact keys of the last few.

The latents c = x · A come from the layer's input x, before rotation, for all kv heads together; K ≈ c · B.
The training of A and B (a reconstruction loss per layer) is not here.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from tests.oracles.coded_attention import decode_over, flushed
from tests.oracles.quantised import Coded, encode
from tests.oracles.rotary import rotate_each
from tests.oracles.rounding import bfloat16_up
from tests.oracles.row import Row


def svd_factors(weight: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """weight [D, W] -> A [D, R], B [R, W], from Wᵀ = U Σ Vᵀ: A = (√Σ Vᵀ)ᵀ, B = (U √Σ)ᵀ.

    Only the product A · B is determined: each pair of a column and a row has a free sign.
    """
    u, sigma, vt = np.linalg.svd(weight.T, full_matrices=False)
    root = np.sqrt(sigma[:rank])
    return (root[:, None] * vt[:rank]).T, (u[:, :rank] * root).T


def channel_means(inputs: np.ndarray) -> np.ndarray:
    """inputs [sequences, T, D] -> s [D]: the means of |x| over each sequence, added up, plus 1e-6.

    Any constant factor of s cancels in `asvd_factors`.
    """
    return np.abs(inputs).mean(axis=1).sum(axis=0) + 1e-6


def asvd_factors(weight: np.ndarray, means: np.ndarray, rank: int, *, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """The factors of diag(s^alpha) · W, with s^-alpha put back on the input side."""
    down, up = svd_factors(means[:, None] ** alpha * weight, rank)
    return down * means[:, None] ** -alpha, up


def encode_clamped_zero(x: np.ndarray, bits: int, group: int, axis: int) -> Coded:
    """As `quantised.encode`, with the released code's zero point: an integer clamped to [0, 2^b - 1].

    So a group whose numbers all have one sign is coded over [0, max] or [min, 0] with a step made for max - min, and
    is cut off where that does not reach. Scale at least 1e-5 / (2^b - 1), in bfloat16.
    """
    levels = 2**bits - 1
    lines = np.moveaxis(x, axis, -1)
    parts = [np.empty_like(x) for _ in range(4)]
    outs = [np.moveaxis(part, axis, -1) for part in parts]
    for line in range(lines.shape[0]):
        for start in range(0, lines.shape[1], group):
            place = (line, slice(start, start + group))
            numbers = lines[place]
            scale = float(bfloat16_up(np.array(max(numbers.max() - numbers.min(), 1e-5) / levels)))
            zero = np.clip(-np.round(numbers.min() / scale), 0, levels)
            codes = np.clip(np.round(numbers / scale) + zero, 0, levels)
            exact = numbers / scale + zero
            filled = (codes, exact, np.full_like(numbers, scale), (codes - zero) * scale)
            for out, part in zip(outs, filled, strict=True):
                out[place] = part
    return Coded(*parts)


@dataclasses.dataclass
class CskvTrace:
    """coded[i]: how many of the oldest tokens have only latents, after the prompt (0), after decoded token i.

    key_latents, value_latents [coded[-1], R]: as decoding finds them. keys (before rotation), values
    [coded[-1], K, H]: what they stand for. key_codes, value_codes: where latents are quantised.
    """

    prompt_output: np.ndarray
    outputs: list[np.ndarray]
    coded: list[int]
    key_latents: np.ndarray
    value_latents: np.ndarray
    keys: np.ndarray
    values: np.ndarray
    key_codes: Coded | None
    value_codes: Coded | None


def cskv(
    row: Row,
    *,
    key_latents: np.ndarray,
    value_latents: np.ndarray,
    key_up: np.ndarray,
    value_up: np.ndarray,
    window: int,
    key_bits: int | None,
    value_bits: int | None,
    value_group: int,
    clamped_zero: bool,
) -> CskvTrace:
    """key_latents, value_latents [T, R] = x · A of all tokens; key_up, value_up [R, K · H] = B.

    Prompt attention is exact. Tokens come in windows of `window`: a complete one lives in its latents alone; of the
    incomplete one keys and values are exact. The token that completes a window still reads it exactly, so 1 .. window
    exact tokens are read, itself among them. Keys are made from latents, then rotated to their original positions.

    key_bits: latents of keys per channel (of R) over the `window` tokens of a window; value_bits: per token over
    `value_group` channels of R (the release: all); None leaves them. clamped_zero: `encode_clamped_zero`, as released.
    """
    counts = [flushed(tokens, window) for tokens in range(row.prompt, row.tokens + 1)]
    quantiser = encode_clamped_zero if clamped_zero else encode
    coded_k, coded_v = key_latents[: counts[-1]], value_latents[: counts[-1]]
    key_codes = None if key_bits is None else quantiser(coded_k, key_bits, window, 0)
    value_codes = None if value_bits is None else quantiser(coded_v, value_bits, value_group, 1)
    coded_k = coded_k if key_codes is None else key_codes.decoded
    coded_v = coded_v if value_codes is None else value_codes.decoded
    keys, values = ((c @ up).reshape(-1, *row.k.shape[1:]) for c, up in ((coded_k, key_up), (coded_v, value_up)))
    rotated = rotate_each(keys, np.arange(counts[-1]), row.theta) if counts[-1] else keys
    outputs = decode_over(row, rotated, values, counts, counts)
    prompt_output = row.attention(row.prompt)[0]
    return CskvTrace(prompt_output, outputs, counts, coded_k, coded_v, keys, values, key_codes, value_codes)
