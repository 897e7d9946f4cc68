"""Latents of a few channels for all heads together (CSKV)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from kvjax.cache.codec.base import Codec
from kvjax.cache.codec.identity import Identity
from kvjax.cache.codec.numbers import bounded
from kvjax.cache.codec.wrapped import Wrapped
from kvjax.cache.layout import CacheDims
from kvjax.errors import UsageError
from kvjax.typing import Array, PyTree
from pallas_kernels.loader import LowRankLoader


@dataclasses.dataclass(frozen=True)
class LowRank(Wrapped):
    """A token's channels of all heads [K·H] are kept as r numbers, x @ encoder, and read as latent @ decoder.

    CSKV (Wang et al., 2024, arXiv:2409.10593, section 3). The paper's latent is made of the layer's input; this one is
    made of the keys or values, which are a linear map of it: `kvjax.convert.low_rank` says why nothing is lost. Keys
    are meant to be stored before rotary embedding, and are then rebuilt, a run of blocks at a time, whenever they are
    read. Values are never rebuilt: latents are summed, and the sum is decoded.

    Bits per element: those of `inner` times r / (K·H). Parameters (`kvjax.convert.low_rank` gives first ones, which
    training improves): encoder f32 [1, 1, K·H, r], decoder f32 [1, K, r, H]. Elements that are not finite: NaN counts
    as 0, infinities saturate.

    Attributes:
      share: r / (K·H); r is rounded to a multiple of 8 and at least 8.
      inner: how latents are stored; each is a vector of one head with r channels.
      window: tokens that become latents together (a multiple of the block of `inner`); with a recent window they stay
        exact until then.

    Raises:
      UsageError: the share is not between 0 and 1, the window is not a multiple, or `inner` has parameters.
    """

    calibrated: ClassVar[bool] = True
    joint: ClassVar[bool] = True

    inner: Codec = Identity()
    share: float = 0.5
    window: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.share <= 1:
            raise UsageError(f"LowRank keeps a share of the channels above 0 and up to 1; got share={self.share!r}")
        if self.window < 1 or self.window % self.inner.block:
            raise UsageError(
                f"LowRank's window is a multiple of the inner codec's block of {self.inner.block} tokens; got "
                f"window={self.window!r}"
            )

    @property
    def block(self) -> int:
        return self.window

    @property
    def read_block(self) -> int:
        return self.inner.read_block

    def rank(self, dims: CacheDims) -> int:
        """r."""
        return max(8, 8 * round(self.share * dims.kv_heads * dims.head_dim / 8))

    def validate(self, head_dim: int) -> None:
        """Any head_dim can be stored; whether `inner` can store r channels shows when parameters are made."""

    def parameter_shapes(self, dims: CacheDims) -> dict[str, jax.ShapeDtypeStruct]:
        rank, channels = self.rank(dims), dims.kv_heads * dims.head_dim
        self.inner.validate(rank)
        return {
            "encoder": jax.ShapeDtypeStruct((1, 1, channels, rank), jnp.float32),
            "decoder": jax.ShapeDtypeStruct((1, dims.kv_heads, rank, dims.head_dim), jnp.float32),
        }

    def encode(self, x: Array, params: PyTree = None) -> PyTree:
        batch, heads, tokens, dim = x.shape
        joint = jnp.moveaxis(bounded(x), 1, 2).reshape(batch, 1, tokens, heads * dim)
        latent = jnp.einsum("...sc,...cr->...sr", joint, params["encoder"][0], precision="highest")
        return self._encode_inner(latent, x.dtype)

    def loader(self, store: PyTree, params: PyTree = None) -> LowRankLoader:
        return LowRankLoader(self.inner.loader(store), params["decoder"][0])
