"""What a selector is, and the one that reads everything."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import jax
import jax.numpy as jnp

from kvjax.cache.layout import CacheDims
from kvjax.typing import Array, PyTree
from pallas_kernels.pages import Pages

if TYPE_CHECKING:
    from kvjax.cache.policy.seen import Tokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chosen:
    """What is read of a body.

    Attributes:
      pages: the pages, as many for all rows and heads.
      read: bool [B, K or 1, n], which of them are; None is all.
    """

    pages: Pages
    read: Array | None = None

    def valid(self, valid: Array) -> Array:
        """bool [B, K or 1, n · size]: which slots of the pages are read; valid bool [B, K or 1, S] of the body."""
        there = self.pages.take(valid)
        return there if self.read is None else there & jnp.repeat(self.read, self.pages.size, axis=-1)


class Selector(abc.ABC):
    """Which pages of the body new tokens read. Sinks, recent window and the tokens themselves are always read.

    A selector saves reading, not memory: it keeps an `index` with something about every page, leaves [B, K, ...], and
    the body stays as it is. The index may also hold what it remembers from one step to the next.

    Class attributes:
      rotated: whether its index is made of keys after rotary embedding, or of those before.
    """

    rotated: ClassVar[bool] = True

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
          keys: f32 [B, K, n, P, H] for n pages; valid: bool [B, K or 1, n, P], which of them there are.
          page: int32 [B, K or 1, n], the pages, none twice; numbers from M on are left out.
        """
        return index

    def choose(self, index: PyTree, tokens: Tokens, valid: Array) -> tuple[Chosen | None, PyTree]:
        """What new tokens read of the body (None: all of it), and the index that has seen them.

        Args:
          tokens: those of one step; right padding is not valid. valid: bool [B, K or 1, M, P], slots that hold tokens.
        """
        return None, index

    def settled(self, indices: Sequence[PyTree]) -> Sequence[PyTree]:
        """The indices of all layers after a step, where layers agree on how much each of them reads in the next."""
        return indices


@dataclasses.dataclass(frozen=True)
class ReadAll(Selector):
    """Every token is read."""

    @property
    def page(self) -> None:
        return None
