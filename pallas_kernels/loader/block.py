"""Any format that can decode a run of its blocks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.loader.base import Loader, PyTree, static
from pallas_kernels.rows import is_rows, tile


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockLoader(Loader):
    """Any format that can decode a run of its blocks; needs no kernel of its own.

    Attributes:
      store: pytree of leaves [..., M, ...], an entry per block or per slot, and `Rows`.
      decode_store: static and hashable; store -> [..., S, H]. A frozen codec's bound `decode` is one.
      width: channels H.
      size: slots per block.
    """

    store: PyTree
    decode_store: Callable[[PyTree], jax.Array] = static()
    width: int = static()
    size: int = static()

    @property
    def block(self) -> int:
        return self.size

    @property
    def head_dim(self) -> int:
        return self.width

    @property
    def slots(self) -> PyTree:
        return self.store

    @property
    def granularity(self) -> int:
        rows = (x for x in jax.tree.leaves(self.store, is_leaf=is_rows) if is_rows(x))
        return math.lcm(self.size, *(tile(x.fold) for x in rows)) // self.size

    @property
    def count(self) -> int:
        return jax.eval_shape(self.decode_store, self.store).shape[-2]

    def with_slots(self, slots: PyTree) -> BlockLoader:
        return dataclasses.replace(self, store=slots)

    def decode(self) -> jax.Array:
        return self.decode_store(self.store).astype(jnp.float32)
