"""Fates: what becomes of a token that loses its place."""

from __future__ import annotations

import abc
import dataclasses


class Fate(abc.ABC):
    """Names what happens to tokens that leave the body."""

    @property
    @abc.abstractmethod
    def summary(self) -> str:
        """A few words for tables."""


@dataclasses.dataclass(frozen=True)
class Drop(Fate):
    """The token is forgotten; its slot is free."""

    @property
    def summary(self) -> str:
        return "drop"
