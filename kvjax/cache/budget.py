"""Budgets: how many tokens a layer may keep. A budget is always what is *kept*."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable

import jax.numpy as jnp

from kvjax.errors import UsageError
from kvjax.typing import Array


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

    @abc.abstractmethod
    def tokens(self, length: int) -> int:
        """Tokens kept of a prompt of `length` tokens, sinks and recent window included."""

    @abc.abstractmethod
    def row_tokens(self, lengths: Array) -> Array:
        """`tokens` for every row: int32 [B] -> int32 [B]."""

    @abc.abstractmethod
    def resolve(self, cost: Callable[[Budget], int], longest: int) -> Budget:
        """This budget in tokens, given what a budget costs in bytes of one row and the longest row.

        Raises:
          UsageError: not even what is always kept fits.
        """


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

    def resolve(self, cost: Callable[[Budget], int], longest: int) -> Budget:
        return self


@dataclasses.dataclass(frozen=True)
class Uniform(Budget):
    """The same budget for every layer and head; exactly one of the fields is given.

    Attributes:
      tokens_kept: a number of tokens.
      share: a share of each row's own prompt, in (0, 1].
      bytes_kept: bytes of one row's cache over all layers, everything counted (codes, scales, positions,
        statistics, slots for decoded tokens); the largest number of tokens that fits is taken
        (`kvjax.cache.plan.resolve`).
    """

    tokens_kept: int | None = None
    share: float | None = None
    bytes_kept: int | None = None

    def __post_init__(self) -> None:
        given = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) is not None]
        if len(given) != 1:
            raise UsageError(f"a uniform budget takes exactly one of tokens, share or bytes; got {given or 'none'}")
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
        return self.tokens_kept if self.tokens_kept is not None else int(length * (self.share or 0.0) + 1e-6)

    def row_tokens(self, lengths: Array) -> Array:
        if self.share is None:
            return jnp.full_like(lengths, self.tokens(0))
        return (lengths * jnp.float32(self.share) + 1e-4).astype(jnp.int32)

    def resolve(self, cost: Callable[[Budget], int], longest: int) -> Budget:
        if self.bytes_kept is None:
            return self
        fitting, low, high = None, 1, longest
        while low <= high:
            middle = Uniform(tokens_kept=(low + high) // 2)
            try:
                fits, possible = cost(middle) <= self.bytes_kept, True
            except UsageError:  # too few tokens for the sinks and the recent window
                fits, possible = True, False
            if fits:
                fitting = middle if possible else fitting
                low = (low + high) // 2 + 1
            else:
                high = (low + high) // 2 - 1
        if fitting is None:
            raise UsageError(
                f"{self.bytes_kept} bytes per row hold neither the sinks and the recent window nor the slots for "
                f"decoded tokens; all tokens take {cost(Uniform(tokens_kept=longest))} bytes"
            )
        return fitting
