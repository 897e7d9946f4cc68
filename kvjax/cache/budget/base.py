"""What a budget is, and the two simplest ones."""

from __future__ import annotations

import abc
import dataclasses
from typing import Self, TypeVar

import jax.numpy as jnp
import numpy as np

from kvjax.cache.layout import CacheDims
from kvjax.errors import UsageError
from kvjax.typing import Array

Number = TypeVar("Number", int, Array)


class Budget(abc.ABC):
    """Turns a prompt's length into a number of tokens per layer and head."""

    @property
    @abc.abstractmethod
    def evicts(self) -> bool:
        """Whether tokens can lose their place."""

    @property
    @abc.abstractmethod
    def relative(self) -> bool:
        """Whether it follows the prompt; then it never falls below what a method always keeps."""

    @property
    def bytes_kept(self) -> int | None:
        """Bytes of one row's cache, where the budget is in bytes: `kvjax.cache.plan.resolve` makes tokens of it."""
        return None

    @property
    def pooled(self) -> bool:
        """Whether heads of a layer share their tokens in a packed pool."""
        return False

    @property
    def least_share(self) -> float:
        """Of a pooled budget: the share of the mean that each head gets in any case."""
        return 1.0

    @abc.abstractmethod
    def tokens(self, length: int) -> int:
        """Tokens kept of a prompt of `length` tokens, sinks and recent window included."""

    @abc.abstractmethod
    def row_tokens(self, lengths: Array) -> Array:
        """`tokens` for every row: int32 [B] -> int32 [B]."""

    def for_layer(self, dims: CacheDims, always: int) -> Budget:
        """This budget for one layer, where `always` tokens are kept in any case; a layer's budget stays as it is."""
        return self

    def by_head(self, dims: CacheDims) -> tuple[tuple[tuple[int, ...], Budget], ...]:
        """The kv heads that share a budget, and the budget; nothing where all heads have this one."""
        return ()

    def with_tokens(self, tokens: int) -> Budget:
        """The same kind of budget, with `tokens` per layer and head on average."""
        return self

    def sized_as(self, other: Sized) -> Budget:
        """The same kind of budget in the size of `other`; where it has no one size, as a table, `other` itself."""
        return other


@dataclasses.dataclass(frozen=True)
class Full(Budget):
    """Every token keeps its place."""

    @property
    def evicts(self) -> bool:
        return False

    @property
    def relative(self) -> bool:
        return False

    def tokens(self, length: int) -> int:
        return length

    def row_tokens(self, lengths: Array) -> Array:
        return lengths


@dataclasses.dataclass(frozen=True)
class Sized(Budget):
    """A budget of a size, which subclasses spread over layers and heads; exactly one of the fields is given.

    Attributes:
      tokens_kept: tokens per layer and head, on average.
      share: a share of each row's own prompt, in (0, 1].
      bytes_kept: bytes of one row's cache over all layers, everything counted (codes, scales, positions,
        statistics, slots for decoded tokens); the largest number of tokens that fits is taken
        (`kvjax.cache.plan.resolve`).
    """

    tokens_kept: int | None = None
    share: float | None = None
    bytes_kept: int | None = None  # pyright: ignore[reportIncompatibleMethodOverride]

    def __post_init__(self) -> None:
        kind, sizes = type(self).__name__, ("tokens_kept", "share", "bytes_kept")
        given = [name for name in sizes if getattr(self, name) is not None]
        if len(given) != 1:
            raise UsageError(f"a {kind} budget takes exactly one of tokens, share or bytes; got {given or 'none'}")
        for name in ("tokens_kept", "bytes_kept"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise UsageError(
                    f"a budget in {name.removesuffix('_kept')} is a whole number of at least 1; got {value!r}"
                )
        if self.share is not None and not 0 < self.share <= 1:
            raise UsageError(f"a budget's share is what is kept, in (0, 1]; got {self.share}")

    @property
    def evicts(self) -> bool:
        return True

    @property
    def relative(self) -> bool:
        return self.share is not None

    def tokens(self, length: int) -> int:
        if self.bytes_kept is not None:
            raise UsageError(
                "a budget in bytes depends on the model: call kvjax.cache.plan.resolve(method, dims) first"
            )
        if self.tokens_kept is not None:
            return self._here(self.tokens_kept)
        return self._here(int(length * (self.share or 0.0) + 1e-6))

    def row_tokens(self, lengths: Array) -> Array:
        if self.share is None:
            return jnp.full_like(lengths, self.tokens(0))
        return self._here((lengths * jnp.float32(self.share) + 1e-4).astype(jnp.int32))

    def with_tokens(self, tokens: int) -> Self:
        return dataclasses.replace(self, tokens_kept=tokens, share=None, bytes_kept=None)

    def sized_as(self, other: Sized) -> Self:
        return dataclasses.replace(self, tokens_kept=other.tokens_kept, share=other.share, bytes_kept=other.bytes_kept)

    @abc.abstractmethod
    def _here(self, mean: Number) -> Number:
        """Tokens of this layer, given those of a layer on average (a number, or int32 [B])."""


@dataclasses.dataclass(frozen=True)
class Uniform(Sized):
    """The same budget for every layer and head."""

    def _here(self, mean: Number) -> Number:
        return mean


@dataclasses.dataclass(frozen=True)
class Layered(Sized):
    """A budget that differs between layers: each layer's part of what they all keep besides what is always kept.

    Attributes:
      layer, layers, always: which layer of how many this is, and the tokens that are kept in any case; `for_layer`
        sets them. Until then the budget is a layer's on average.
    """

    layer: int | None = None
    layers: int = 1
    always: int = 0

    def for_layer(self, dims: CacheDims, always: int) -> Self:
        if self.layer is not None:
            return self
        return dataclasses.replace(self, layer=dims.layer, layers=dims.layers, always=always)

    @abc.abstractmethod
    def weights(self) -> np.ndarray:
        """f64 [L], one number per layer; the mean is 1."""

    def _here(self, mean: Number) -> Number:
        if self.layer is None:
            return mean
        # Rounded cumulatively: over all layers not a token is lost or won.
        ends = np.concatenate([[0.0], np.cumsum(self.weights())])
        free = mean - self.always
        free = max(free, 0) if isinstance(free, int) else jnp.maximum(free, 0)
        before, after = (_floor(free, float(end)) for end in ends[self.layer : self.layer + 2])
        return mean - free + after - before


def _floor(count: Number, factor: float) -> Number:
    """The whole part of count * factor; exact products are not lost to rounding."""
    if isinstance(count, int):
        return int(count * factor + 1e-6)
    return (count * jnp.float32(factor) + 1e-3).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class Table(Budget):
    """Several budgets, of which a subclass' table says who has which; whoever asks for tokens has one already."""

    budgets: tuple[Budget, ...]

    @property
    def evicts(self) -> bool:
        return any(budget.evicts for budget in self.budgets)

    @property
    def relative(self) -> bool:
        return any(budget.relative for budget in self.budgets)

    def tokens(self, length: int) -> int:
        return max(budget.tokens(length) for budget in self.budgets)

    def row_tokens(self, lengths: Array) -> Array:
        raise UsageError(f"a {type(self).__name__} is no budget until it is asked for one of its own")

    def with_tokens(self, tokens: int) -> Self:
        return dataclasses.replace(self, budgets=tuple(budget.with_tokens(tokens) for budget in self.budgets))

    @abc.abstractmethod
    def for_layer(self, dims: CacheDims, always: int) -> Budget:
        """See `Budget.for_layer`."""

    def _row(self, table: tuple, dims: CacheDims) -> int:
        """The entry of a table by layer that serves a layer; a single one serves all.

        Raises:
          UsageError: the table is for another number of layers.
        """
        if len(table) not in (1, dims.layers):
            raise UsageError(f"{type(self).__name__} has a table for {len(table)} layers; the model has {dims.layers}")
        return dims.layer % len(table)
