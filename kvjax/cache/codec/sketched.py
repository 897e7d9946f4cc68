"""Signs of random projections: of what another codec leaves (TurboQuant's product form), or of keys (QJL)."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from kvjax.cache.codec.numbers import bounded, length, whole_bytes
from kvjax.cache.codec.rotation import sketch
from kvjax.cache.codec.wrapped import Wrapped
from kvjax.typing import Array, PyTree
from pallas_kernels.loader import CodebookLoader, ConcatLoader, LowRankLoader
from pallas_kernels.packing import pack
from pallas_kernels.rows import Rows

SIGNS = ((-1.0, 1.0),)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Signs:
    """m/8 uint8 of signs and one bfloat16 norm [..., S] per token."""

    codes: Rows
    norm: Array

    @classmethod
    def of(cls, x: Array, matrix: NDArray[np.float32]) -> Signs:
        """The signs of x [..., S, H] in each direction of `matrix` [m, H], and |x|."""
        projections = jnp.einsum("...h,mh->...m", x, matrix, precision="highest")
        return cls(Rows.of(pack(projections > 0, 1)), length(x).astype(jnp.bfloat16))

    @property
    def loader(self) -> CodebookLoader:
        """m numbers per token: signs times the norm. `estimator` makes vectors of them."""
        return CodebookLoader(self.codes, jnp.asarray(SIGNS, jnp.float32), 1, None, self.norm)


def estimator(matrix: NDArray[np.float32]) -> Array:
    """f32 [m, H]: signs times the norm, times this, estimates x without bias (QJL, arXiv:2406.03482, lemma 3.2)."""
    return jnp.asarray(matrix) * (math.sqrt(math.pi / 2) / len(matrix))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SketchedStore:
    """What `inner` stores, and signs of what it leaves."""

    inner: PyTree
    rest: Signs


@dataclasses.dataclass(frozen=True)
class Sketched(Wrapped):
    """x is kept as `inner` of x and one sign per channel of a random sketch of the rest, so that products have no bias.

    With `Rotated(LloydMax(bits - 1))` inside it is TurboQuant's form for inner products (Zandieh et al., 2025,
    arXiv:2504.19874, algorithm 2): E(q · decoded) = q · x, while the squared error of x itself is larger than that of
    the form without a sketch and one bit more.

    Bits per element: those of `inner`, + 1 + 16/H for the norm of the rest (bfloat16).
    """

    seed: int = 1

    def validate(self, head_dim: int) -> None:
        super().validate(head_dim)
        whole_bytes(head_dim, 1)

    def encode(self, x: Array, params: PyTree = None) -> SketchedStore:
        self.validate(x.shape[-1])
        store = self.inner.encode(x)
        rest = bounded(x) - self.inner.loader(store).decode()
        return SketchedStore(store, Signs.of(rest, self._matrix(x.shape[-1])))

    def loader(self, store: SketchedStore, params: PyTree = None) -> LowRankLoader:
        inner, rest = self.inner.loader(store.inner), store.rest.loader
        dim = inner.head_dim
        up = jnp.concatenate([jnp.eye(dim), estimator(self._matrix(dim))])
        return LowRankLoader(ConcatLoader((inner, rest)), up[None])

    def _matrix(self, dim: int) -> NDArray[np.float32]:
        return sketch(dim, dim, self.seed)
