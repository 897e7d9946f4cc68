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
    """What new tokens read. It saves reading, not memory; the cache stays as it is.

    Either some pages of the body (`page`, `choose`): an `index` knows something about each, leaves [B, K, ...], and may
    also hold what it remembers from one step to the next; sinks, recent window and the tokens themselves are always
    read. Or all keys, and the values of some slots wherever they lie (`values`, `weigh`).

    Class attributes:
      rotated: whether its index is made of keys after rotary embedding, or of those before.
    """

    rotated: ClassVar[bool] = True

    @property
    @abc.abstractmethod
    def page(self) -> int | None:
        """Slots per page; None where no pages are chosen."""

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

    @property
    def values(self) -> int | None:
        """Of how many slots a query of a decoded token reads the values; None is those of all whose keys it reads."""
        return None

    def weigh(self, logits: Array) -> tuple[Array, Array]:
        """The `values` slots whose values are read, int32 [..., C], and their weights, f32 [..., C].

        Args:
          logits: f32 [..., S], those of the whole cache and of the token itself, the last; -inf where not seen. S is
            more than `values`.
        """
        raise NotImplementedError(f"{type(self).__name__} reads the values of all slots whose keys it reads")

    def settled(self, indices: Sequence[PyTree]) -> Sequence[PyTree]:
        """The indices of all layers after a step, where layers agree on how much each of them reads in the next."""
        return indices


@dataclasses.dataclass(frozen=True)
class ReadAll(Selector):
    """Every token is read."""

    @property
    def page(self) -> None:
        return None
