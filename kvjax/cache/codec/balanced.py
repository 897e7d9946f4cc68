"""Key channels balanced against the queries before they are coded (MiKV)."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

import jax
import jax.numpy as jnp

from kvjax.cache.codec.wrapped import Wrapped
from kvjax.cache.layout import CacheDims
from kvjax.cache.prompt import group_filled
from kvjax.typing import Array, PyTree
from pallas_kernels.loader import ScaledLoader

if TYPE_CHECKING:
    from kvjax.cache.policy.seen import Prompt

FLOOR = 1e-6
"""Least magnitude that counts, so that a channel that is 0 throughout a prompt has a finite balance."""


@dataclasses.dataclass(frozen=True)
class Balanced(Wrapped):
    """Keys are kept as `inner` of k · b, with b = sqrt(max|q| / max|k|) for each row, kv head and channel of a prompt.

    MiKV (Yang et al., 2024, arXiv:2402.18096, equation 2): a channel in which keys are large and queries are small is
    made smaller before it shares a scale with others. The maxima are over the prompt's rotated queries, those of a kv
    head taken together, and over the keys as they are stored. Reading costs nothing: queries are divided by b instead.

    Bits per element: those of `inner`. Parameters: b, f32 [B, K, H].
    """

    fits_prompt: ClassVar[bool] = True

    def parameter_shapes(self, dims: CacheDims) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((dims.batch, dims.kv_heads, dims.head_dim), jnp.float32)

    def fitted(self, params: PyTree, x: Array, prompt: Prompt) -> Array:
        exists = prompt.valid[:, None, :, None]
        reads = jnp.asarray(group_filled(prompt.step))[..., None, None]
        queries = jnp.where(exists[:, :, None] & reads, jnp.abs(prompt.queries.astype(jnp.float32)), 0.0).max((2, 3))
        keys = jnp.where(exists, jnp.abs(x.astype(jnp.float32)), 0.0).max(2)
        return jnp.sqrt(jnp.maximum(queries, FLOOR) / jnp.maximum(keys, FLOOR))

    def encode(self, x: Array, params: PyTree = None) -> PyTree:
        return self._encode_inner(x.astype(jnp.float32) * params[:, :, None], x.dtype)

    def loader(self, store: PyTree, params: PyTree = None) -> ScaledLoader:
        return ScaledLoader(self.inner.loader(store), 1.0 / params)
