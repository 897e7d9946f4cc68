"""Grouped-query attention (Ainslie et al., 2023, arXiv 2305.13245); one kv head per query head is its special case."""

from __future__ import annotations

from typing import Any, Protocol

import flax.linen as nn
import jax.numpy as jnp

from kvjax.attention.norm import RMSNorm
from kvjax.attention.projection import Projection
from kvjax.cache.prompt import attend_prompt
from kvjax.cache.step import Step
from kvjax.typing import Array
from pallas_kernels.rope import Rope


class LayerCacheProtocol(Protocol):
    """What attention needs of a layer's cache."""

    def step(self, step: Step) -> tuple[Array, Any]:
        """Stores the new tokens and attends: (out [B, T, N, H], the layer's next cache)."""
        ...


class GroupedQueryAttention(nn.Module):
    """Projects, normalises queries and keys where asked, and leaves the rest to the cache.

    Attributes:
      num_heads, num_kv_heads, head_dim: N, K, H.
      scale: multiplies q·k.
      window: sliding window in tokens, or None.
      softcap: cap of the attention logits, or None.
      kv_head_of_query: see `Step`.
      qkv_bias, output_bias: biases of the projections.
      qk_norm: RMS norm over head_dim of queries and keys, before rotary embedding.
      norm_eps, norm_offset: of those norms.
      dtype: of the parameters at initialisation.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None
    softcap: float | None = None
    kv_head_of_query: tuple[int, ...] | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    norm_eps: float = 1e-6
    norm_offset: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Array,
        *,
        positions: Array,
        valid: Array,
        rope: Rope | None,
        cache: LayerCacheProtocol | None = None,
    ) -> tuple[Array, Any]:
        """x [B, T, D], positions int32 [B, T], valid bool [B, T] -> (out [B, T, D], next layer cache or None)."""
        embed_dim = x.shape[-1]
        q = self._heads("q", self.num_heads, embed_dim)(x)
        k = self._heads("k", self.num_kv_heads, embed_dim)(x)
        v = self._heads("v", self.num_kv_heads, embed_dim)(x)
        if self.qk_norm:
            q, k = self._norm("q_norm")(q), self._norm("k_norm")(k)
        output = Projection(
            (self.num_heads, self.head_dim), (embed_dim,), use_bias=self.output_bias, dtype=self.dtype, name="o"
        )
        step = Step(
            queries=q,
            keys=k,
            values=v,
            positions=positions,
            valid=valid,
            rope=rope,
            hidden=x,
            output_projection=output.kernel,
            scale=self.scale,
            window=self.window,
            softcap=self.softcap,
            kv_head_of_query=self.kv_head_of_query,
        )
        out, cache = (attend_prompt(step)[0], None) if cache is None else cache.step(step)
        return output(out), cache

    def _heads(self, name: str, heads: int, embed_dim: int) -> Projection:
        return Projection((embed_dim,), (heads, self.head_dim), use_bias=self.qkv_bias, dtype=self.dtype, name=name)

    def _norm(self, name: str) -> RMSNorm:
        return RMSNorm(self.norm_eps, self.norm_offset, self.dtype, name=name)
