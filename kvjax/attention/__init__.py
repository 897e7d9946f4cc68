"""Attention modules: they project, and hand one `Step` to the cache or to prompt attention."""

from kvjax.attention.base import AttentionConfig, AttentionKind, AttentionModule, CacheShape, LayerCacheProtocol, attend
from kvjax.attention.grouped_query import GroupedQuery, GroupedQueryAttention
from kvjax.attention.shared import SharedKeyValues

__all__ = [
    "AttentionConfig",
    "AttentionKind",
    "AttentionModule",
    "CacheShape",
    "GroupedQuery",
    "GroupedQueryAttention",
    "LayerCacheProtocol",
    "SharedKeyValues",
    "attend",
]
