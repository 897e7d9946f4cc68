"""Rotary pairs as radii and angles (PolarQuant, Wu et al.)."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp

from kvjax.cache.codec.base import Codec
from kvjax.cache.codec.numbers import bounded
from kvjax.cache.codec.scale import least_scale, round_down
from kvjax.errors import UsageError, unknown
from kvjax.typing import Array, PyTree
from pallas_kernels.loader import BlockLoader
from pallas_kernels.packing import WIDTHS, pack, unpack
from pallas_kernels.rows import Rows

CIRCLE = 2 * math.pi


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cells:
    """The cells of a range in which numbers lie.

    Attributes:
      codes: H/2 numbers of cells per token, packed in planes.
      low, step: bfloat16 [..., M, H/2], where the range of each pair and group of tokens begins, and the size of its
        cells; None where the range is the whole circle.
    """

    codes: Rows
    low: Array | None
    step: Array | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PairStore:
    """Radii and angles of H/2 pairs of channels."""

    radius: Cells
    angle: Cells


@dataclasses.dataclass(frozen=True)
class PolarPairs(Codec):
    """Channels i and i + H/2, which rotary embedding turns together, are kept as a radius and an angle.

    PolarQuant (Wu et al., 2025, arXiv:2502.00527): an outlying channel of keys is outlying together with its partner;
    their radius then varies little among tokens, and the rest is in the angle. A range is cut into 2**bits cells, and a
    cell decodes to its middle. The range of radii is that of a pair in a group of tokens; that of angles too ('group',
    as released), or the whole circle ('circle'), which needs no numbers of its own.

    Bits per element: (radius_bits + angle_bits + 32/group)/2, with angles 'group' 16/group more. Elements that are not
    finite: NaN counts as 0, infinities saturate.

    Attributes:
      radius_bits, angle_bits: 8, 4, 2 or 1. group: tokens that share ranges.

    Raises:
      UsageError: an attribute has no such value.
    """

    radius_bits: int = 4
    angle_bits: int = 4
    group: int = 32
    angles: Literal["group", "circle"] = "group"

    def __post_init__(self) -> None:
        for bits in (self.radius_bits, self.angle_bits):
            if bits not in WIDTHS:
                raise UsageError(f"PolarPairs has codes of {', '.join(map(str, WIDTHS))} bits; got {bits!r}")
        if self.group < 1:
            raise UsageError(f"PolarPairs needs groups of at least 1 token; got group={self.group!r}")
        if self.angles not in ("group", "circle"):
            raise unknown("angles of PolarPairs", self.angles, ("group", "circle"))

    @property
    def block(self) -> int:
        return self.group

    def validate(self, head_dim: int) -> None:
        unit = 16 // min(self.radius_bits, self.angle_bits)
        if head_dim % unit:
            raise UsageError(
                f"codes of {16 // unit} bits for each pair fill whole bytes only if head_dim is a multiple of {unit}; "
                f"head_dim is {head_dim}"
            )

    def encode(self, x: Array, params: PyTree = None) -> PairStore:
        self.validate(x.shape[-1])
        first, second = jnp.split(bounded(x), 2, axis=-1)
        angle = jnp.arctan2(second, first)
        angle = jnp.where(angle < 0, angle + CIRCLE, angle)
        fitted = self.angles == "group"
        return PairStore(
            self._cells(jnp.hypot(first, second), self.radius_bits, True),
            self._cells(angle, self.angle_bits, fitted),
        )

    def loader(self, store: PairStore, params: PyTree = None) -> BlockLoader:
        width = store.angle.codes.width * 8 // self.angle_bits * 2
        return BlockLoader(store, self._decode_groups, width, self.group)

    def _cells(self, x: Array, bits: int, fitted: bool) -> Cells:
        """x [..., S, H/2] in cells of its groups' ranges, or of the circle."""
        groups = x.reshape(*x.shape[:-2], -1, self.group, x.shape[-1])
        low, step = None, None
        if fitted:
            low = round_down(groups.min(-2))
            step = least_scale((groups.max(-2) - low.astype(jnp.float32)) / 2**bits)
        begin, size = _range(low, step, bits)
        codes = jnp.clip(jnp.floor((groups - begin) / size), 0, 2**bits - 1)
        return Cells(Rows.of(pack(codes.reshape(x.shape), bits)), low, step)

    def _middles(self, cells: Cells, bits: int) -> Array:
        """f32 [..., M, group, H/2]."""
        codes = unpack(cells.codes.natural(), bits).astype(jnp.float32)
        begin, size = _range(cells.low, cells.step, bits)
        return begin + (codes.reshape(*codes.shape[:-2], -1, self.group, codes.shape[-1]) + 0.5) * size

    def _decode_groups(self, store: PairStore) -> Array:
        """f32 [..., S, H]."""
        radius, angle = self._middles(store.radius, self.radius_bits), self._middles(store.angle, self.angle_bits)
        pairs = jnp.concatenate([radius * jnp.cos(angle), radius * jnp.sin(angle)], axis=-1)
        return pairs.reshape(*pairs.shape[:-3], -1, pairs.shape[-1])


def _range(low: Array | None, step: Array | None, bits: int) -> tuple[Array | float, Array | float]:
    """Where cells begin and their size, f32 [..., M, 1, H/2] or numbers."""
    if low is None or step is None:
        return 0.0, CIRCLE / 2**bits
    return low.astype(jnp.float32)[..., None, :], step.astype(jnp.float32)[..., None, :]
