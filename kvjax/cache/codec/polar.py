"""Vectors as the angles of a recursive polar transform (PolarQuant, Han et al.)."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from kvjax.cache.codec.base import Codec
from kvjax.cache.codec.numbers import bounded, look_up, nearest
from kvjax.errors import UsageError
from kvjax.typing import Array, PyTree
from pallas_kernels.loader import BlockLoader
from pallas_kernels.packing import pack, unpack
from pallas_kernels.rows import Rows

FIRST_BITS, DEEPER_BITS = 4, 2


@functools.cache
def angle_codebook(level: int, bits: int) -> NDArray[np.float64]:
    """[2**bits] angles in (0, π/2), rising: of least squared error for the angles of a level from 2 on.

    The angle between the norms of two independent vectors of n = 2**(level - 1) normal numbers has a density
    proportional to sin(2θ)**(n - 1). Lloyd's iteration on a grid.
    """
    angles = (np.arange(20_000) + 0.5) / 20_000 * math.pi / 2
    density = np.sin(2 * angles) ** (2 ** (level - 1) - 1)
    mass, moment = (np.concatenate([[0.0], np.cumsum(a)]) for a in (density, density * angles))
    entries = (np.arange(2**bits) + 0.5) / 2**bits * math.pi / 2
    for _ in range(10_000):
        ends = np.searchsorted(angles, 0.5 * (entries[1:] + entries[:-1]))
        cuts = np.concatenate([[0], ends, [len(angles)]])
        moved = np.diff(moment[cuts]) / np.diff(mass[cuts])
        if np.array_equal(moved, entries):
            break
        entries = moved
    return entries


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PolarStore:
    """Angles and radii of groups of 2**levels neighbouring channels.

    Attributes:
      first: the angles of the first level, H/2 codes of 4 bits per token.
      deeper: those of all other levels, one level after the other, codes of 2 bits filled up to whole bytes; or None.
      radius: bfloat16, an array [..., S] per group.
    """

    first: Rows
    deeper: Rows | None
    radius: tuple[Array, ...]


@dataclasses.dataclass(frozen=True)
class Polar(Codec):
    """A vector is kept as angles: of pairs of channels, of pairs of their radii, and so on, and a radius at the end.

    PolarQuant (Han et al., 2025, arXiv:2502.02617), which rotates vectors at random before: `Rotated(Polar())`. Then
    the angles' distributions are known: the first level's are even over the circle and take 4 bits each, the deeper
    ones gather around π/4 and take 2 bits each of a codebook of their level. No angle needs a scale.

    Bits per element, groups of n = 2**levels channels: (4·n/2 + 2·(n/2 - 1) + 16)/n, that is 3.875 with 4 levels (the
    deeper codes of a token are filled up to whole bytes). Elements that are not finite: NaN counts as 0, infinities
    saturate.

    Attributes:
      levels: how often radii are paired, 1 to 6; H must be a multiple of 2**levels.

    Raises:
      UsageError: another number of levels.
    """

    levels: int = 4

    def __post_init__(self) -> None:
        if self.levels not in range(1, 7):
            raise UsageError(f"Polar has 1 to 6 levels; got levels={self.levels!r}")

    @property
    def block(self) -> int:
        return 1

    def validate(self, head_dim: int) -> None:
        unit = max(4, 2**self.levels)
        if head_dim % unit:
            raise UsageError(
                f"Polar with {self.levels} levels needs a multiple of {unit} channels; head_dim is {head_dim}"
            )

    def encode(self, x: Array, params: PyTree = None) -> PolarStore:
        self.validate(x.shape[-1])
        x = bounded(x)
        angles = jnp.arctan2(x[..., 1::2], x[..., ::2])
        first = jnp.round(angles * (2**FIRST_BITS / (2 * math.pi)) - 0.5).astype(jnp.int32) % 2**FIRST_BITS
        radius, deeper = jnp.hypot(x[..., ::2], x[..., 1::2]), []
        for level in range(2, self.levels + 1):
            angles = jnp.arctan2(radius[..., 1::2], radius[..., ::2])
            deeper.append(nearest(angles, self._table(level)))
            radius = jnp.hypot(radius[..., ::2], radius[..., 1::2])
        codes = jnp.concatenate(deeper, axis=-1) if deeper else None
        if codes is not None:
            codes = jnp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % 4)])
        return PolarStore(
            first=Rows.of(pack(first, FIRST_BITS)),
            deeper=None if codes is None else Rows.of(pack(codes, DEEPER_BITS)),
            radius=tuple(jnp.moveaxis(radius.astype(jnp.bfloat16), -1, 0)),
        )

    def loader(self, store: PolarStore, params: PyTree = None) -> BlockLoader:
        return BlockLoader(store, self._decode_store, store.first.width * 8 // FIRST_BITS * 2, 1)

    def _decode_store(self, store: PolarStore) -> Array:
        """f32 [..., S, H]."""
        radius = jnp.stack(store.radius, axis=-1).astype(jnp.float32)
        if store.deeper is not None:
            codes = unpack(store.deeper.natural(), DEEPER_BITS)
            end = radius.shape[-1] * (2 ** (self.levels - 1) - 1)
            for level in range(self.levels, 1, -1):
                begin = end - radius.shape[-1]
                radius = _unfold(radius, look_up(codes[..., begin:end], self._table(level)))
                end = begin
        angles = (unpack(store.first.natural(), FIRST_BITS).astype(jnp.float32) + 0.5) * (2 * math.pi / 2**FIRST_BITS)
        return _unfold(radius, angles)

    @staticmethod
    def _table(level: int) -> Array:
        return jnp.asarray(angle_codebook(level, DEEPER_BITS), jnp.float32)


def _unfold(radius: Array, angle: Array) -> Array:
    """[..., 2n]: the pairs of neighbours that have these radii and angles [..., n]."""
    pair = jnp.stack([radius * jnp.cos(angle), radius * jnp.sin(angle)], axis=-1)
    return pair.reshape(*pair.shape[:-2], -1)
