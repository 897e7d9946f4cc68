"""What a codec is: the format in which a segment keeps the keys, or the values, of its tokens."""

from __future__ import annotations

import abc
import math
from typing import final

import jax
import jax.numpy as jnp

from kvjax.typing import Array, PyTree
from pallas_kernels import rows
from pallas_kernels.loader import Loader


class Codec(abc.ABC):
    """A storage format. Codecs are frozen dataclasses: hashable, comparable, without arrays.

    A store is a pytree whose leaves are arrays that lead with [..., n], one entry per token or per block of `block`
    tokens, and `pallas_kernels.rows.Rows`. All methods work under `jit` and `vmap`; what they compute for one block
    depends on that block alone.
    """

    @property
    @abc.abstractmethod
    def block(self) -> int:
        """Tokens per block: the unit of encoding, eviction and transfer."""

    @abc.abstractmethod
    def validate(self, head_dim: int) -> None:
        """Raises `UsageError`, with what would work, if vectors of `head_dim` channels cannot be stored."""

    @abc.abstractmethod
    def encode(self, x: Array) -> PyTree:
        """The store of `x` [..., S, H], any floating dtype; S is a multiple of `block`."""

    @abc.abstractmethod
    def loader(self, store: PyTree) -> Loader:
        """How a kernel reads the store."""

    @final
    def decode(self, store: PyTree) -> Array:
        """f32 [..., S, H]: what a kernel sees when it reads the store."""
        return self.loader(store).decode()

    @final
    def empty(self, lead_shape: tuple[int, ...], blocks: int, head_dim: int, dtype: jnp.dtype) -> PyTree:
        """A store of zeros for `blocks` blocks; decodes to zeros. `dtype` is that of the vectors to come."""
        layout = self._layout((*lead_shape, blocks), head_dim, dtype)
        return rows.fold(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), layout))

    @final
    def even_slots(self, head_dim: int) -> int:
        """The multiple of tokens that a store should hold for its rows to come out even on this platform."""
        leaves = jax.tree.leaves(self._layout((1,), head_dim, jnp.dtype("float32")), is_leaf=rows.is_rows)
        return math.lcm(*(rows.even_slots(x.width) for x in leaves if rows.is_rows(x)))

    @final
    def bits_per_element(self, head_dim: int, dtype: jnp.dtype) -> float:
        """Stored bits per element, everything counted that grows with the tokens (codes, scales, zero points)."""
        leaves = jax.tree.leaves(self._layout((1,), head_dim, dtype))
        stored = sum(math.prod(leaf.shape) * leaf.dtype.itemsize * 8 for leaf in leaves)
        return stored / (self.block * head_dim)

    @final
    def _layout(self, lead: tuple[int, ...], head_dim: int, dtype: jnp.dtype) -> PyTree:
        """Shapes and dtypes of the leaves of a store with leading axes `lead`, the last of which counts blocks."""
        shape = (*lead[:-1], lead[-1] * self.block, head_dim)
        return jax.eval_shape(self.encode, jax.ShapeDtypeStruct(shape, dtype))
