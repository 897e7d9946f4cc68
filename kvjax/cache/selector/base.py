"""What a selector is, and the one that reads everything."""

from __future__ import annotations

import abc
import dataclasses

from kvjax.cache.layout import CacheDims
from kvjax.typing import Array, PyTree
from pallas_kernels.pages import Pages


class Selector(abc.ABC):
    """Which pages of the body a decoded token reads. Sinks, recent window and the token itself are always read.

    A selector saves reading, not memory: it keeps an `index` with something about every page, leaves [B, K, M, ...],
    and the body stays as it is.
    """

    @property
    @abc.abstractmethod
    def page(self) -> int | None:
        """Slots per page; None where everything is read."""

    def index(self, dims: CacheDims, pages: int) -> PyTree:
        """The index of an empty body of `pages` pages."""
        return None

    def indexed(self, index: PyTree, keys: Array, valid: Array, page: Array) -> PyTree:
        """The index after keys have entered pages.

        Args:
          keys: f32 [B, K, n, P, H], rotated, for n pages; valid: bool [B, K or 1, n, P], which of them there are.
          page: int32 [B, K or 1, n], the pages, none twice; numbers from M on are left out.
        """
        return index

    def choose(self, index: PyTree, queries: Array, valid: Array) -> Pages | None:
        """The pages that queries read, or None for all of them.

        Args:
          queries: f32 [B, K, R, H], rotated, of one token. valid: bool [B, K or 1, M, P], slots that hold tokens.
        """
        return None


@dataclasses.dataclass(frozen=True)
class ReadAll(Selector):
    """Every token is read."""

    @property
    def page(self) -> None:
        return None
