"""Attention modules: they project, and hand one `Step` to the cache or to prompt attention."""

from kvjax.attention.allocation import KeyNorms
from kvjax.attention.base import AttentionConfig, AttentionKind, AttentionModule, CacheShape, LayerCacheProtocol, attend
from kvjax.attention.bidirectional import Bidirectional
from kvjax.attention.differential import DifferentialAttention, DiffQKV
from kvjax.attention.ffnified import FFNified, FFNifiedAttention, FFNifiedGrid, FFNifiedGridAttention
from kvjax.attention.grouped_query import GroupedQuery, GroupedQueryAttention
from kvjax.attention.key_driven import KeyDriven, LayerMaps
from kvjax.attention.latent import MultiHeadLatent, MultiHeadLatentAttention
from kvjax.attention.projected_keys import ProjectedKeys
from kvjax.attention.selective import SelectiveAttention
from kvjax.attention.shared import SharedKeyValues
from kvjax.attention.temperature import SelfSelective, SelfSelectiveAttention

__all__ = [
    "AttentionConfig",
    "AttentionKind",
    "AttentionModule",
    "Bidirectional",
    "CacheShape",
    "DiffQKV",
    "DifferentialAttention",
    "FFNified",
    "FFNifiedAttention",
    "FFNifiedGrid",
    "FFNifiedGridAttention",
    "GroupedQuery",
    "GroupedQueryAttention",
    "KeyDriven",
    "KeyNorms",
    "LayerCacheProtocol",
    "LayerMaps",
    "MultiHeadLatent",
    "MultiHeadLatentAttention",
    "ProjectedKeys",
    "SelectiveAttention",
    "SelfSelective",
    "SelfSelectiveAttention",
    "SharedKeyValues",
    "attend",
]
