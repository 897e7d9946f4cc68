"""Attention modules: they project, and hand one `Step` to the cache or to prompt attention."""

from kvjax.attention.grouped_query import GroupedQueryAttention

__all__ = ["GroupedQueryAttention"]
