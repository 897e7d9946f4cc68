"""Eight bits with a fixed scale per channel, taken from the prompt: integers, or float8.

The description gives no more than that; what it leaves open is an argument (the smallest code, the scale of a channel
that was zero all through the prompt, whether a token reads itself coded).
"""

from __future__ import annotations

import dataclasses

import numpy as np

from tests.oracles.coded_attention import decode_over
from tests.oracles.rounding import Stored
from tests.oracles.row import Row


def float8_numbers(exponent_bits: int, mantissa_bits: int, *, infinite: bool) -> np.ndarray:
    """All finite numbers >= 0 of a float8 format by code. e4m3fn: 4, 3, False, up to 448. e5m2: 5, 2, True, 57344.

    infinite: the largest exponent stands for infinity and NaN; otherwise only its largest mantissa does, for NaN.
    """
    bias = 2 ** (exponent_bits - 1) - 1
    numbers = []
    for exponent in range(2**exponent_bits - infinite):
        for mantissa in range(2**mantissa_bits):
            fraction = mantissa / 2**mantissa_bits
            numbers.append((fraction if exponent == 0 else 1 + fraction) * 2.0 ** (max(exponent, 1) - bias))
    return np.array(numbers if infinite else numbers[:-1])


def round_float8(x: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """The nearest number of the format, the one with the even code halfway; beyond the largest, the largest."""
    out = np.zeros(x.shape)
    for place in np.ndindex(*x.shape):
        distance = np.abs(numbers - abs(x[place]))
        nearest = np.flatnonzero(distance == distance.min())
        code = nearest[0] if len(nearest) == 1 else nearest[nearest % 2 == 0][0]
        out[place] = np.copysign(numbers[code], x[place])
    return out


@dataclasses.dataclass(frozen=True)
class Static:
    """One head's numbers [S, H]: codes (integers, or numbers of the float8 format), the same before rounding and
    saturation (`exact`), scale [H], where they saturated, what decoding returns.
    """

    codes: np.ndarray
    exact: np.ndarray
    scale: np.ndarray
    saturated: np.ndarray
    decoded: np.ndarray


def channel_scale(prompt: np.ndarray, largest: float, *, stored: Stored, empty: float) -> np.ndarray:
    """prompt [P, H] -> [H]: max |x| / largest as stored; `empty` where a channel has only zeros."""
    scale = stored(np.abs(prompt).max(axis=0) / largest)
    return np.where(scale == 0, empty, scale)


def encode_int8(x: np.ndarray, prompt: np.ndarray, *, lowest: int, stored: Stored, empty: float) -> Static:
    """x [S, H], prompt [P, H]. Symmetric; codes from `lowest` (-128 or -127) to 127, rounded half to even."""
    scale = channel_scale(prompt, 127.0, stored=stored, empty=empty)
    exact = x / scale
    codes = np.clip(np.round(exact), lowest, 127)
    return Static(codes, exact, scale, codes != np.round(exact), codes * scale)


def encode_float8(x: np.ndarray, prompt: np.ndarray, *, numbers: np.ndarray, stored: Stored, empty: float) -> Static:
    """x [S, H], prompt [P, H], numbers from `float8_numbers`. The largest number of the prompt becomes the largest."""
    scale = channel_scale(prompt, float(numbers[-1]), stored=stored, empty=empty)
    exact = x / scale
    codes = round_float8(exact, numbers)
    return Static(codes, exact, scale, np.abs(exact) > numbers[-1], codes * scale)


@dataclasses.dataclass
class StaticTrace:
    """prompt_output [P, N, H], an output [N, H] per decoded token; keys[h] (rotated), values[h]: all T tokens."""

    prompt_output: np.ndarray
    outputs: list[np.ndarray]
    keys: list[Static]
    values: list[Static]


def static_scale(
    row: Row, *, numbers: np.ndarray | None, lowest: int, stored: Stored, empty: float, own_coded: bool
) -> StaticTrace:
    """numbers: of a float8 format; None means integers from `lowest`. Prompt attention is exact, then all is coded.

    A decoded token reads all others coded, and itself exactly or, with own_coded, coded too.
    """
    k, heads = row.rotated[1], range(row.kv_heads)

    def coded(x: np.ndarray) -> Static:
        if numbers is None:
            return encode_int8(x, x[: row.prompt], lowest=lowest, stored=stored, empty=empty)
        return encode_float8(x, x[: row.prompt], numbers=numbers, stored=stored, empty=empty)

    keys, values = ([coded(x[:, h]) for h in heads] for x in (k, row.v))
    held_keys, held_values = (np.stack([c.decoded for c in part], axis=1) for part in (keys, values))
    counts = [t + own_coded for t in range(row.prompt, row.tokens)]
    outputs = decode_over(row, held_keys, held_values, counts, counts)
    return StaticTrace(row.attention(row.prompt)[0], outputs, keys, values)
