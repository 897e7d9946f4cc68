"""A scale per channel that a prompt fixes."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

import jax
import jax.numpy as jnp

from kvjax.cache.codec.scale import LIMIT
from kvjax.cache.codec.wrapped import Wrapped
from kvjax.cache.layout import CacheDims
from kvjax.errors import UsageError
from kvjax.typing import Array, PyTree
from pallas_kernels.loader import ScaledLoader

if TYPE_CHECKING:
    from kvjax.cache.policy.seen import Prompt

SMALLEST = 2.0**-100
"""Least scale, far from where a machine flushes products with numbers of any inner format to 0."""


@dataclasses.dataclass(frozen=True)
class PerChannel(Wrapped):
    """x is kept as `inner` of x / scale, with a scale per row, kv head and channel: the largest of a prompt fits.

    Static scaling per channel, as serving engines do with int8 and float8. Tokens that come after the prompt saturate
    where they are larger than all of it. Costs nothing per token to store or to read: scales are applied to queries, or
    to the output. Bits per element: those of `inner`. Parameters: scale, f32 [B, K, H].

    Attributes:
      inner: a format without scales: `Fixed`, or `Float8` with scale 'none'.

    Raises:
      UsageError: another format.
    """

    fits_prompt: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self._limit >= LIMIT:
            raise UsageError(
                f"PerChannel needs a format without scales, Fixed or Float8(scale='none'); got {self.inner}"
            )

    def parameter_shapes(self, dims: CacheDims) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((dims.batch, dims.kv_heads, dims.head_dim), jnp.float32)

    def fitted(self, params: PyTree, x: Array, prompt: Prompt) -> Array:
        x = x.astype(jnp.float32)
        counts = prompt.valid[:, None, :, None] & jnp.isfinite(x)
        top = jnp.where(counts, jnp.clip(jnp.abs(x), 0.0, LIMIT), 0.0).max(2)
        return jnp.maximum(top / self._limit, SMALLEST)

    def encode(self, x: Array, params: PyTree = None) -> PyTree:
        return self._encode_inner(x.astype(jnp.float32) / params[:, :, None], x.dtype)

    def loader(self, store: PyTree, params: PyTree = None) -> ScaledLoader:
        return ScaledLoader(self.inner.loader(store), params)

    @property
    def _limit(self) -> float:
        """Largest number of the inner format; `LIMIT` for a format with scales, which stores any number."""
        return getattr(self.inner, "limit", LIMIT)
