"""`ConvolutionState`: stands where a layer's cache does, for a layer that keeps no keys and values."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.cache.layout import CacheDims
from kvjax.cache.method import CacheMethod
from kvjax.typing import Array

_EXACT = CacheMethod(name="full")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ConvolutionState:
    """What later tokens need of a causal mixer of two convolutions.

    Its size does not depend on how many tokens a row has seen. Zeros before a row's first token are the padding of the
    convolutions. What layers with keys and values are asked for besides has its empty form here.

    Attributes:
      queries: [B, k - 1, D], the last inputs of the first convolution.
      coefficients: [B, k - 1, D], the last inputs of the second.
      length: int32 [B], tokens each row has seen.
      dims: static; `convolved` is k - 1 and `width` D.
    """

    queries: Array
    coefficients: Array
    length: Array
    dims: CacheDims = dataclasses.field(metadata={"static": True})

    @classmethod
    def empty(cls, dims: CacheDims) -> ConvolutionState:
        """Of rows that have seen nothing; every array has a buffer of its own, so that steps can be given it."""
        assert dims.convolved is not None
        shape = (dims.batch, dims.convolved, dims.width)
        queries, coefficients = (jnp.zeros(shape, dims.dtype) for _ in range(2))
        return cls(queries, coefficients, jnp.zeros((dims.batch,), jnp.int32), dims)

    @classmethod
    def alone(cls, batch: int, inputs: int, width: int, dtype: Any) -> ConvolutionState:
        """`empty` without a model's cache around it; inputs is k - 1, width D."""
        sizes = {"width": width, "dtype": jnp.dtype(dtype).name, "convolved": inputs}
        return cls.empty(CacheDims(batch, 0, 0, 0, np.iinfo(np.int32).max, 0, **sizes))

    @staticmethod
    def planned(dims: CacheDims) -> int:
        """Bytes that `empty` will allocate."""
        assert dims.convolved is not None
        return dims.batch * (2 * dims.convolved * dims.width * jnp.dtype(dims.dtype).itemsize + 4)

    @property
    def nbytes(self) -> int:
        """Allocated bytes: the sum of the arrays."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    @property
    def method(self) -> CacheMethod:
        """The only one that there can be."""
        return _EXACT

    @property
    def parts(self) -> tuple[()]:
        """No heads, so no caches of theirs."""
        return ()

    @property
    def segments(self) -> tuple[()]:
        """No tokens lie in slots."""
        return ()

    @property
    def phase(self) -> str:
        """A prompt's tokens and later ones are treated alike."""
        return "decode"

    def in_phase(self, phase: str) -> ConvolutionState:
        """See `LayerCache.in_phase`."""
        del phase
        return self

    def end_prompt(self) -> ConvolutionState:
        """See `LayerCache.end_prompt`."""
        return self
