"""Tokens as they are."""

from __future__ import annotations

import dataclasses

from kvjax.cache.codec.base import Codec
from kvjax.typing import Array, PyTree
from pallas_kernels.loader import DenseLoader


@dataclasses.dataclass(frozen=True)
class Identity(Codec):
    """Stores vectors unchanged, in the dtype in which they come. The store is the array itself, [..., S, H]."""

    @property
    def block(self) -> int:
        return 1

    def validate(self, head_dim: int) -> None:
        """Every head_dim can be stored."""

    def encode(self, x: Array, params: PyTree = None) -> Array:
        return x

    def loader(self, store: Array, params: PyTree = None) -> DenseLoader:
        return DenseLoader(store)
