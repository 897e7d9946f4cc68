"""Codecs around another codec: a map of the channels before it."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from kvjax.cache.codec.base import Codec
from kvjax.errors import UsageError
from kvjax.typing import Array, PyTree


@dataclasses.dataclass(frozen=True)
class Wrapped(Codec):
    """A codec that stores other vectors than it is given, in the format `inner`.

    Attributes:
      inner: a codec without parameters.

    Raises:
      UsageError: `inner` has parameters of its own.
    """

    inner: Codec

    def __post_init__(self) -> None:
        if self.inner.calibrated or self.inner.fits_prompt or self.inner.joint:
            raise UsageError(
                f"{type(self).__name__} cannot hold {self.inner}: the inner codec must need no calibration, take "
                "nothing from the prompt and store each head by itself"
            )

    @property
    def block(self) -> int:
        return self.inner.block

    def validate(self, head_dim: int) -> None:
        self.inner.validate(head_dim)

    def _encode_inner(self, mapped: Array, dtype: jnp.dtype) -> PyTree:
        """What `inner` stores of `mapped` (float32), in the dtypes in which it stores vectors of `dtype`.

        Codes are computed in float32 whatever the dtype of the tokens, which are float32 when a ring gives them up.
        """
        shapes = jax.eval_shape(self.inner.encode, jax.ShapeDtypeStruct(mapped.shape, dtype))
        return jax.tree.map(lambda leaf, shape: leaf.astype(shape.dtype), self.inner.encode(mapped), shapes)
