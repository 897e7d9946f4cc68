"""What a query reads of the body."""

from kvjax.cache.selector.base import ReadAll, Selector
from kvjax.cache.selector.top_pages import TopPages

__all__ = ["ReadAll", "Selector", "TopPages"]
