"""Attention to an earlier layer's keys and values (cross-layer attention: Brandon et al., 2024, arXiv 2405.12981)."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn

from kvjax.attention.base import AttentionConfig, AttentionKind, AttentionModule, CacheShape, LayerCacheProtocol
from kvjax.cache.shared import Sharing
from kvjax.typing import Array
from pallas_kernels.rope import Rope


@dataclasses.dataclass(frozen=True)
class SharedKeyValues(AttentionKind):
    """Queries and an output projection, no keys and values: those of the layer that `kv_layers` names are read."""

    def module(self, config: AttentionConfig, dtype: Any, name: str) -> nn.Module:
        return SharedKeyValueAttention(config, dtype, name=name)

    def cache_shape(self, config: AttentionConfig) -> CacheShape:
        raise NotImplementedError("a layer without keys and values has no cache")


class SharedKeyValueAttention(AttentionModule):
    """Hands its queries to what the layer that owns the keys and values has left for it."""

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
        del positions, valid, rope
        config, embed_dim = self.config, x.shape[-1]
        assert isinstance(cache, Sharing)
        q = self.heads("q", config.num_heads, config.head_dim, embed_dim)(x)
        if config.qk_norm:
            q = self.norm("q_norm")(q)
        output = self.output(config.num_heads, config.head_dim, embed_dim)
        out, cache = cache.read(q)
        return output(out), cache
