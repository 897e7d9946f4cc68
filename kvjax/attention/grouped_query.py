"""Grouped-query attention (Ainslie et al., 2023, arXiv 2305.13245); one kv head per query head is its special case."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn

from kvjax.attention.base import AttentionConfig, AttentionKind, AttentionModule, CacheShape, LayerCacheProtocol
from kvjax.cache.step import Allocation
from kvjax.typing import Array
from pallas_kernels.rope import Rope


@dataclasses.dataclass(frozen=True)
class GroupedQuery(AttentionKind):
    """N query heads share K kv heads: multi-head attention where K = N, multi-query attention where K = 1."""

    def module(self, config: AttentionConfig, dtype: Any, name: str) -> nn.Module:
        return GroupedQueryAttention(config, dtype, name=name)

    def cache_shape(self, config: AttentionConfig) -> CacheShape:
        return CacheShape(config.num_kv_heads, config.head_dim)

    @property
    def shares_layers(self) -> bool:
        return True


class GroupedQueryAttention(AttentionModule):
    """Projects, normalises queries and keys where asked, and leaves the rest to the cache.

    Attributes:
      allocation: gives the kv head that each query head reads, where that is data; see `Step`.
      selective: whether tokens hide others; see `Step`.
    """

    allocation: Allocation | None = None
    selective: bool = False

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
        config, embed_dim = self.config, x.shape[-1]
        q = self.heads("q", config.num_heads, config.head_dim, embed_dim)(x)
        k = self.heads("k", config.num_kv_heads, config.head_dim, embed_dim)(x)
        v = self.heads("v", config.num_kv_heads, config.head_dim, embed_dim)(x)
        q, k = self.normed(q, k)
        output = self.output(config.num_heads, config.head_dim, embed_dim)
        return self.attended(
            x,
            output,
            cache,
            queries=q,
            keys=k,
            values=v,
            positions=positions,
            valid=valid,
            rope=rope,
            scale=config.scale,
            kv_head_of_query=config.kv_head_of_query,
            allocation=self.allocation,
            selective=self.selective,
        )
