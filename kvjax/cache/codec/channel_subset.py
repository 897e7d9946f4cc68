"""Some channels of the keys (ThinK)."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

import jax
import jax.numpy as jnp

from kvjax.cache.codec.base import Codec
from kvjax.cache.codec.identity import Identity
from kvjax.cache.codec.wrapped import Wrapped
from kvjax.cache.layout import CacheDims
from kvjax.cache.prompt import group_filled
from kvjax.errors import UsageError
from kvjax.typing import Array, PyTree
from pallas_kernels.loader import SubsetLoader

if TYPE_CHECKING:
    from kvjax.cache.policy.seen import Prompt


@dataclasses.dataclass(frozen=True)
class ChannelSubset(Wrapped):
    """Of each row's and kv head's channels those that a prompt's products need most are kept, as `inner`; others are 0.

    ThinK (Xu et al., 2024, arXiv:2407.21018, section 3): a channel counts |q_c|·|k_c|, over each row's last `window`
    queries, those of a kv head together, and all keys of the prompt. The store has C = share · H channels; queries drop
    the others before they meet it.

    Bits per element: those of `inner` for C channels, times C/H. Parameters: which channels, bool [B, K, H].

    Attributes:
      share: C / H; C is rounded to a multiple of 8 where H is at least 16.
      inner: how the C channels are stored.
      window: queries that count.

    Raises:
      UsageError: the share is not between 0 and 1, the window below 1, or `inner` has parameters.
    """

    fits_prompt: ClassVar[bool] = True

    inner: Codec = Identity()
    share: float = 0.6
    window: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.share <= 1 or self.window < 1:
            raise UsageError(
                f"ChannelSubset keeps a share above 0 and up to 1, chosen by at least 1 query; "
                f"got share={self.share!r}, window={self.window!r}"
            )

    def channels(self, head_dim: int) -> int:
        """C."""
        unit = 8 if head_dim >= 16 else 1
        return max(unit, unit * round(self.share * head_dim / unit))

    def validate(self, head_dim: int) -> None:
        self.inner.validate(self.channels(head_dim))

    def parameter_shapes(self, dims: CacheDims) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((dims.batch, dims.kv_heads, dims.head_dim), jnp.bool_)

    def fitted(self, params: PyTree, x: Array, prompt: Prompt) -> Array:
        queries, _, exists = prompt.last_queries(self.window)
        seen = exists[:, None, None, :, None] & jnp.asarray(group_filled(prompt.step))[..., None, None]
        needed = jnp.where(seen, queries.astype(jnp.float32) ** 2, 0.0).sum((2, 3))
        present = jnp.where(prompt.valid[:, None, :, None], x.astype(jnp.float32) ** 2, 0.0).sum(2)
        _, chosen = jax.lax.top_k(needed * present, self.channels(x.shape[-1]))
        return (chosen[..., None] == jnp.arange(x.shape[-1])).any(-2)

    def encode(self, x: Array, params: PyTree = None) -> PyTree:
        index = jnp.broadcast_to(self._index(params)[:, :, None], (*x.shape[:3], self.channels(x.shape[-1])))
        return self._encode_inner(jnp.take_along_axis(x, index, axis=-1).astype(jnp.float32), x.dtype)

    def loader(self, store: PyTree, params: PyTree = None) -> SubsetLoader:
        return SubsetLoader(self.inner.loader(store), self._index(params), params.shape[-1])

    def _index(self, kept: Array) -> Array:
        """int32 [B, K, C], rising: the numbers of the channels that are kept."""
        return jnp.argsort(~kept, axis=-1, stable=True)[..., : self.channels(kept.shape[-1])].astype(jnp.int32)
