"""The codebook of least squared error for normal numbers (Lloyd, 1957; Max, 1960)."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from kvjax.cache.codec.base import Codec
from kvjax.cache.codec.numbers import bounded, length, nearest, whole_bytes
from kvjax.errors import UsageError
from kvjax.typing import Array, PyTree
from pallas_kernels.loader import CodebookLoader
from pallas_kernels.packing import split
from pallas_kernels.rows import Rows

BITS = (4, 3, 2, 1)


@functools.cache
def normal_codebook(bits: int) -> NDArray[np.float64]:
    """[2**bits], rising: the entries of least E(x - nearest)² for x ~ N(0, 1), to 1e-12 by fixed-point iteration."""
    half = 2 ** (bits - 1)
    entries = (np.arange(half) + 0.5) * 2.5 / half  # the positive ones; the codebook is symmetric
    for _ in range(100_000):
        edges = np.concatenate([[0.0], 0.5 * (entries[1:] + entries[:-1]), [math.inf]])
        density = np.exp(-0.5 * edges**2) / math.sqrt(2 * math.pi)
        below = np.array([0.5 * (1 + math.erf(edge / math.sqrt(2))) for edge in edges])
        moved = -np.diff(density) / np.diff(below)
        done = np.abs(moved - entries).max() < 1e-12
        entries = moved
        if done:
            break
    return np.concatenate([-entries[::-1], entries])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScaledCodes:
    """Codes of a fixed codebook, as `pallas_kernels.CodebookLoader` reads them.

    Attributes:
      codes: H·bits/8 uint8 per token, packed in planes; of 3 bits, the low 2. high: the high bits of codes of 3 bits.
      scale: bfloat16 [..., S].
    """

    codes: Rows
    high: Rows | None
    scale: Array


@dataclasses.dataclass(frozen=True)
class LloydMax(Codec):
    """A vector is kept as its norm and the nearest entries, for each channel, of a codebook for normal numbers.

    What is coded is x · sqrt(H) / |x|, by the norm as stored, whose channels are close to N(0, 1) once x is rotated at
    random: the format inside `Rotated`, of TurboQuant (Zandieh et al., 2025, arXiv:2504.19874, algorithm 1). There the
    expected squared error is 0.363, 0.117, 0.0345 and 0.0095 of |x|² at 1 to 4 bits. Whatever x is, no channel is
    further from its entry than from any other.

    Bits per element: bits + 16/H for the norm (bfloat16). Elements that are not finite: NaN counts as 0, infinities
    saturate.

    Attributes:
      bits: 4, 3, 2 or 1.

    Raises:
      UsageError: no such number of bits.
    """

    bits: int = 4

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise UsageError(f"LloydMax codes have {', '.join(map(str, BITS))} bits; got bits={self.bits!r}")

    @property
    def block(self) -> int:
        return 1

    def validate(self, head_dim: int) -> None:
        whole_bytes(head_dim, self.bits)

    def encode(self, x: Array, params: PyTree = None) -> ScaledCodes:
        self.validate(x.shape[-1])
        x = bounded(x)
        scale = (length(x) / math.sqrt(x.shape[-1])).astype(jnp.bfloat16)
        stored = scale.astype(jnp.float32)[..., None]
        low, high = split(nearest(x / jnp.where(stored > 0, stored, 1.0), self._table), self.bits)
        return ScaledCodes(Rows.of(low), None if high is None else Rows.of(high), scale)

    def loader(self, store: ScaledCodes, params: PyTree = None) -> CodebookLoader:
        return CodebookLoader(store.codes, self._table[None], self.bits, store.high, store.scale)

    @property
    def _table(self) -> Array:
        return jnp.asarray(normal_codebook(self.bits), jnp.float32)
