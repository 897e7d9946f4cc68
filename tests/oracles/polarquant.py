"""Two methods named PolarQuant.

`recursive`: Han et al. 2025 (arXiv 2502.02617), random rotation and a tree of angles. From memory and notes.
`pairs`: Wu et al. 2025 (arXiv 2502.00527), radius and angle of every rotary pair of the rotated key.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from tests.oracles.coded_attention import decode_over, flushed
from tests.oracles.lloyd_max import angle_density, lloyd_max
from tests.oracles.rounding import Stored, bfloat16_down, bfloat16_up
from tests.oracles.row import Row


def angle_codebook(level: int, bits: int, *, iterations: int = 5000) -> np.ndarray:
    """Level 1: the middles of 2^bits equal parts of [0, 2π). Deeper: Lloyd-Max of the angle's density on [0, π/2]."""
    if level == 1:
        return (np.arange(2**bits) + 0.5) * 2 * math.pi / 2**bits
    return lloyd_max(*angle_density(level), 2**bits, iterations=iterations)


@dataclasses.dataclass(frozen=True)
class Recursive:
    """x [S, H]: angles[l - 1], codes[l - 1], margins[l - 1] [S, H / 2^l] of level l; radii [S, H / 2^levels] as stored;
    decoded [S, H]. margin: the distance by which a code's angle is nearer than the next.
    """

    angles: list[np.ndarray]
    codes: list[np.ndarray]
    margins: list[np.ndarray]
    radii: np.ndarray
    decoded: np.ndarray


def encode_recursive(
    x: np.ndarray, rotation: np.ndarray, codebooks: Sequence[np.ndarray], *, stored: Stored
) -> Recursive:
    """One codebook of angles per level; the paper has four levels of 4, 2, 2, 2 bits, so a radius for 16 channels.

    Level 1 takes neighbours (2j, 2j + 1) of Π x to radius and angle in [0, 2π); a deeper level takes neighbouring
    radii (r, r') to sqrt(r² + r'²) and atan(r' / r) in [0, π / 2]. Angles of level 1 are compared on the circle.
    """
    radii, angles, codes, margins = x @ rotation.T, [], [], []
    for level, book in enumerate(codebooks, start=1):
        first, second = radii[:, 0::2], radii[:, 1::2]
        angle = np.arctan2(second, first)
        if level == 1:
            angle = np.where(angle < 0, angle + 2 * math.pi, angle)
        distance = np.abs(angle[..., None] - book)
        if level == 1:
            distance = np.minimum(distance, 2 * math.pi - distance)
        ordered = np.sort(distance, axis=-1)
        angles.append(angle)
        codes.append(distance.argmin(axis=-1))
        margins.append(ordered[..., 1] - ordered[..., 0])
        radii = np.sqrt(first**2 + second**2)
    radii = stored(radii)
    decoded = radii
    for book, code in zip(reversed(codebooks), reversed(codes), strict=True):
        halves = decoded * np.cos(book[code]), decoded * np.sin(book[code])
        decoded = np.stack(halves, axis=-1).reshape(len(x), -1)
    return Recursive(angles, codes, margins, radii, decoded @ rotation)


@dataclasses.dataclass(frozen=True)
class Cells:
    """Codes as numbered cells: codes, the same before rounding down (`exact`), zero, step, the middle of the cell."""

    codes: np.ndarray
    exact: np.ndarray
    zero: np.ndarray
    step: np.ndarray
    decoded: np.ndarray


def _cells(x: np.ndarray, bits: int, zero: np.ndarray, step: np.ndarray) -> Cells:
    exact = np.where(step == 0, 0.0, (x - zero) / np.where(step == 0, 1.0, step))
    codes = np.clip(np.floor(exact), 0, 2**bits - 1)
    return Cells(codes, exact, zero, step, zero + (codes + 0.5) * step)


@dataclasses.dataclass(frozen=True)
class Pairs:
    """One head's rotated keys [S, H]: radius and angle [S, H / 2] of the pairs (i, i + H / 2), and decoded [S, H]."""

    radius: Cells
    angle: Cells
    decoded: np.ndarray


def encode_pairs(
    k: np.ndarray, *, radius_bits: int, angle_bits: int, group: int, fitted_angles: bool, bfloat16: bool
) -> Pairs:
    """Ranges are per pair over `group` tokens, cut into 2^bits equal cells of which the middle is decoded.

    Radius: from the smallest to the largest of the group. Angle, in [0, 2π): fitted_angles, the same (as released);
    otherwise the whole circle, without stored numbers. bfloat16: zero rounded down, step rounded up to cover the
    group. That the middle of a cell is decoded is inferred from codes being rounded down.
    """
    half = k.shape[1] // 2
    first, second = k[:, :half], k[:, half:]
    radius, angle = np.sqrt(first**2 + second**2), np.arctan2(second, first)
    angle = np.where(angle < 0, angle + 2 * math.pi, angle)
    cells = []
    for x, bits, fitted in ((radius, radius_bits, True), (angle, angle_bits, fitted_angles)):
        zero, step = np.zeros(x.shape), np.full(x.shape, 2 * math.pi / 2**bits)
        for start in range(0, len(x) if fitted else 0, group):
            tokens = slice(start, start + group)
            low, high = x[tokens].min(axis=0), x[tokens].max(axis=0)
            low = bfloat16_down(low) if bfloat16 else low
            size = (high - low) / 2**bits
            zero[tokens], step[tokens] = low, bfloat16_up(size) if bfloat16 else size
        cells.append(_cells(x, bits, zero, step))
    radius, angle = cells
    turned = radius.decoded * np.cos(angle.decoded), radius.decoded * np.sin(angle.decoded)
    return Pairs(radius, angle, np.concatenate(turned, axis=1))


@dataclasses.dataclass
class PairsTrace:
    """coded[i]: how many of the oldest keys are coded after the prompt (0), after decoded token i; keys[h] those."""

    prompt_output: np.ndarray
    outputs: list[np.ndarray]
    coded: list[int]
    keys: list[Pairs]


def polar_pairs(
    row: Row,
    *,
    radius_bits: int,
    angle_bits: int,
    group: int,
    residual: int,
    fitted_angles: bool,
    bfloat16: bool,
) -> PairsTrace:
    """Keys are coded by the block of `residual` tokens once that many are exact (as in `kivi_released`; 128 in the
    release, the group too). Values are exact, as released. Prompt attention is exact.
    """
    assert residual % group == 0
    counts = [flushed(tokens, residual) for tokens in range(row.prompt, row.tokens + 1)]
    keys = [
        encode_pairs(
            row.rotated[1][: counts[-1], h],
            radius_bits=radius_bits,
            angle_bits=angle_bits,
            group=group,
            fitted_angles=fitted_angles,
            bfloat16=bfloat16,
        )
        for h in range(row.kv_heads)
    ]
    held = np.stack([coded.decoded for coded in keys], axis=1)
    outputs = decode_over(row, held, row.v, counts, counts)
    return PairsTrace(row.attention(row.prompt)[0], outputs, counts, keys)
