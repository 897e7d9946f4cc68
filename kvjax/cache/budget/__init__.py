"""How many tokens a layer, and each of its heads, may keep. A budget is always what is *kept*."""

from kvjax.cache.budget.adaptive_heads import AdaptiveHeads
from kvjax.cache.budget.base import Budget, Full, Sized, Uniform
from kvjax.cache.budget.by_layer import LayerTable, Prefix
from kvjax.cache.budget.head_table import HeadTable
from kvjax.cache.budget.pyramid import Pyramid

__all__ = ["AdaptiveHeads", "Budget", "Full", "HeadTable", "LayerTable", "Prefix", "Pyramid", "Sized", "Uniform"]
