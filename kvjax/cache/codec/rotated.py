"""Vectors rotated at random before they are coded (TurboQuant, PolarQuant)."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from kvjax.cache.codec.rotation import rotation
from kvjax.cache.codec.wrapped import Wrapped
from kvjax.typing import Array, PyTree
from pallas_kernels.loader import LowRankLoader


@dataclasses.dataclass(frozen=True)
class Rotated(Wrapped):
    """x is kept as `inner` of x rotated by a random orthogonal matrix, the same for all heads, layers and tokens.

    With `LloydMax` inside it is TurboQuant (Zandieh et al., 2025, arXiv:2504.19874, algorithm 1: least squared error):
    whatever the vector, its rotated channels are close to independent and normal, so that one codebook that is known
    beforehand serves all, and no channel is an outlier. Reading rotates the queries, or the output, once.

    Bits per element: those of `inner`; the matrix is a constant of the program, fixed by the seed.
    """

    seed: int = 0

    def encode(self, x: Array, params: PyTree = None) -> PyTree:
        matrix = rotation(x.shape[-1], self.seed)
        rotated = jnp.einsum("...h,ch->...c", x.astype(jnp.float32), matrix, precision="highest")
        return self._encode_inner(rotated, x.dtype)

    def loader(self, store: PyTree, params: PyTree = None) -> LowRankLoader:
        inner = self.inner.loader(store)
        return LowRankLoader(inner, jnp.asarray(rotation(inner.head_dim, self.seed))[None])
