"""What a query reads of the body."""

from kvjax.cache.selector.base import Chosen, ReadAll, Selector
from kvjax.cache.selector.probed_pages import ProbedPages
from kvjax.cache.selector.top_pages import TopPages
from kvjax.cache.selector.top_values import TopValues

__all__ = ["Chosen", "ProbedPages", "ReadAll", "Selector", "TopPages", "TopValues"]
