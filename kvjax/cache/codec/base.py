"""What a codec is: the format in which a segment keeps the keys, or the values, of its tokens."""

from __future__ import annotations

import abc
import dataclasses
import math
from typing import TYPE_CHECKING, ClassVar, final

import jax
import jax.numpy as jnp

from kvjax.cache.calibrated import as_calibrated
from kvjax.cache.layout import CacheDims
from kvjax.typing import Array, PyTree
from pallas_kernels import rows
from pallas_kernels.loader import Loader

if TYPE_CHECKING:
    from kvjax.cache.policy.seen import Prompt


class Codec(abc.ABC):
    """A storage format. Codecs are frozen dataclasses: hashable, comparable, without arrays.

    A store is a pytree whose leaves are arrays that lead with [B, K or 1, n], one entry per token or per block of
    `block` tokens, and `pallas_kernels.rows.Rows`. All methods work under `jit`; what they compute for one block
    depends on that block, and on the codec's parameters, alone.

    Parameters are what a codec must know besides: learnt beforehand (a codebook, factors) or taken from each row's
    prompt (a balancer). They are arrays [B or 1, K or 1, ...] that a cache holds and counts; most codecs have none.

    Class attributes:
      calibrated: parameters are learnt beforehand, by `kvjax calibrate`.
      fits_prompt: parameters are taken from each row's prompt, which then has to be prefilled exactly.
      joint: heads share one store; then they hold the same tokens.
    """

    calibrated: ClassVar[bool] = False
    fits_prompt: ClassVar[bool] = False
    joint: ClassVar[bool] = False

    @property
    @abc.abstractmethod
    def block(self) -> int:
        """Tokens per block: the unit of encoding, eviction and transfer."""

    @property
    def read_block(self) -> int:
        """Tokens that can be read only together: `block`, unless tokens are encoded together and stored one by one."""
        return self.block

    @abc.abstractmethod
    def validate(self, head_dim: int) -> None:
        """Raises `UsageError`, with what would work, if vectors of `head_dim` channels cannot be stored."""

    @abc.abstractmethod
    def encode(self, x: Array, params: PyTree = None) -> PyTree:
        """The store of `x` [B, K, S, H], any floating dtype; S is a multiple of `block`."""

    @abc.abstractmethod
    def loader(self, store: PyTree, params: PyTree = None) -> Loader:
        """How a kernel reads the store."""

    def for_layer(self, dims: CacheDims) -> Codec:
        """This codec for one layer of a model."""
        return self

    def parameter_shapes(self, dims: CacheDims) -> PyTree:
        """ShapeDtypeStructs of the parameters; None where there are none."""
        return None

    def fitted(self, params: PyTree, x: Array, prompt: Prompt) -> PyTree:
        """The parameters that a prompt gives, where the codec `fits_prompt`.

        Args:
          params: those of the empty cache. x: [B, K, T, H], the keys as they are stored, or the values.
        """
        return params

    @final
    def parameters(self, dims: CacheDims, data: PyTree = None) -> PyTree:
        """The parameters of an empty cache: `data`, if the codec is calibrated, else ones until a prompt gives them.

        Raises:
          UsageError: data is missing, or has other shapes.
        """
        shapes = self.parameter_shapes(dims)
        if not self.calibrated:
            return jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), shapes)
        return as_calibrated(self, shapes, data, dims)

    @final
    def decode(self, store: PyTree, params: PyTree = None) -> Array:
        """f32 [B, K or 1, S, H]: what a kernel sees when it reads the store."""
        return self.loader(store, params).decode()

    @final
    def empty(self, dims: CacheDims, blocks: int) -> PyTree:
        """A store of zeros for `blocks` blocks of every row and head of a cache."""
        layout = self._layout(dims, dims.batch, blocks)
        return rows.fold(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), layout))

    @final
    def even_slots(self, dims: CacheDims) -> int:
        """The multiple of tokens that a store should hold for its rows to come out even on this platform."""
        leaves = jax.tree.leaves(self._layout(dims, 1, 1), is_leaf=rows.is_rows)
        return math.lcm(*(rows.even_slots(x.width) for x in leaves if rows.is_rows(x)))

    @final
    def bits_per_element(self, dims: CacheDims) -> float:
        """Stored bits per element, everything counted that grows with the tokens (codes, scales, zero points)."""
        leaves = jax.tree.leaves(self._layout(dims, 1, 1))
        stored = sum(math.prod(leaf.shape) * leaf.dtype.itemsize * 8 for leaf in leaves)
        return stored / (self.block * dims.kv_heads * dims.head_dim)

    @final
    def parameter_bytes(self, dims: CacheDims) -> int:
        """Bytes of the parameters of a cache."""
        leaves = jax.tree.leaves(self.parameter_shapes(dims))
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)

    @final
    def _layout(self, dims: CacheDims, batch: int, blocks: int) -> PyTree:
        """Shapes and dtypes of the leaves of a store."""
        x = jax.ShapeDtypeStruct((batch, dims.kv_heads, blocks * self.block, dims.head_dim), jnp.dtype(dims.dtype))
        return jax.eval_shape(self.encode, x, self.parameter_shapes(dataclasses.replace(dims, batch=batch)))
