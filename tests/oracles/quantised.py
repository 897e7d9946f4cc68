"""Round-to-nearest quantisation of a cache: KIVI (Liu et al. 2024), and plain integers per token."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from tests.oracles.attention import attend
from tests.oracles.row import Row


def bfloat16(x: float, *, up: bool) -> float:
    """The nearest number with eight significant bits that is not below (`up`) or not above `x`."""
    mantissa, exponent = np.frexp(x)
    steps = np.ceil(mantissa * 256) if up else np.floor(mantissa * 256)
    return float(np.ldexp(steps / 256, exponent))


@dataclasses.dataclass(frozen=True)
class Coded:
    """Numbers after encoding: integer `codes`, the same before rounding (`exact`), `scale`, what decoding returns."""

    codes: np.ndarray
    exact: np.ndarray
    scale: np.ndarray
    decoded: np.ndarray


def encode_group(x: np.ndarray, bits: int) -> Coded:
    """One group of numbers [n]. Codes come from the stored 16-bit scale and zero, so that every number is covered."""
    levels = 2**bits - 1
    zero = bfloat16(float(x.min()), up=False)
    scale = bfloat16((float(x.max()) - zero) / levels, up=True)
    exact = np.zeros_like(x) if scale == 0 else (x - zero) / scale
    codes = np.clip(np.round(exact), 0, levels)
    return Coded(codes, exact, np.full_like(x, scale), zero + scale * codes)


def encode(x: np.ndarray, bits: int, group: int, axis: int) -> Coded:
    """x [S, H] in groups of `group` consecutive numbers along `axis`: 0 per channel over tokens, 1 per token."""
    parts = [np.empty_like(x) for _ in range(4)]
    lines = np.moveaxis(x, axis, -1)
    outs = [np.moveaxis(part, axis, -1) for part in parts]
    for line in range(lines.shape[0]):
        for start in range(0, lines.shape[1], group):
            place = (line, slice(start, start + group))
            coded = encode_group(lines[place], bits)
            for out, part in zip(outs, (coded.codes, coded.exact, coded.scale, coded.decoded), strict=True):
                out[place] = part
    return Coded(*parts)


def coded_tokens(tokens: int, window: int, group: int) -> int:
    """How many of the oldest tokens are coded: a token that finds the exact ring full makes it give up `group`."""
    ring = -(-(window - 1) // group) * group + group
    coded = exact = 0
    for _ in range(tokens):
        if exact == ring:
            coded, exact = coded + group, exact - group
        exact += 1
    return coded


@dataclasses.dataclass
class CodedTrace:
    """Outputs as in `Trace`. coded[i]: how many of the oldest tokens are coded after the prompt (0), after token i.

    keys[h], values[h]: the coded part of kv head h in the end.
    """

    prompt_output: np.ndarray
    outputs: list[np.ndarray]
    coded: list[int]
    keys: list[Coded]
    values: list[Coded]


def kivi(row: Row, *, bits: int, window: int, group: int) -> CodedTrace:
    """Keys per channel over `group` tokens, values per token over `group` channels, the newest tokens exact."""
    return _run(row, bits, (group, 0), (group, 1), lambda tokens: coded_tokens(tokens, window, group))


def per_token(row: Row, *, bits: int, group: int) -> CodedTrace:
    """Keys and values per token over `group` channels; only the token that is being decoded is exact."""
    return _run(row, bits, (group, 1), (group, 1), lambda tokens: tokens)


def _run(
    row: Row, bits: int, key_form: tuple[int, int], value_form: tuple[int, int], coded: Callable[[int], int]
) -> CodedTrace:
    """Prompt attention is exact. A decoded token reads the coded tokens, the exact ones and itself."""
    q, k = row.rotated
    heads = range(row.kv_heads)
    counts = [coded(tokens) for tokens in range(row.prompt, row.tokens + 1)]
    keys = [encode(k[: counts[-1], h], bits, *key_form) for h in heads]
    values = [encode(row.v[: counts[-1], h], bits, *value_form) for h in heads]
    outputs = []
    for t, count in zip(range(row.prompt, row.tokens), counts, strict=False):
        held_keys = [np.concatenate([keys[h].decoded[:count], k[count : t + 1, h]]) for h in heads]
        held_values = [np.concatenate([values[h].decoded[:count], row.v[count : t + 1, h]]) for h in heads]
        outputs.append(attend(q[t], held_keys, held_values, reads=row.reads)[0])
    return CodedTrace(row.attention(row.prompt)[0], outputs, counts, keys, values)
