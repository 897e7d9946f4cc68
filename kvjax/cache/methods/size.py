"""The options that every evicting method takes."""

from __future__ import annotations

from typing import TypedDict

from kvjax.cache.budget import Uniform

DEFAULT_SHARE = 0.25


class Size(TypedDict):
    """The fields of `Sized` that say how large a budget is; one is not None."""

    tokens_kept: int | None
    share: float | None
    bytes_kept: int | None


def size(tokens: int | None, share: float | None, bytes: int | None, default: float = DEFAULT_SHARE) -> Size:
    """What is given, or the default share of the prompt."""
    if tokens is None and share is None and bytes is None:
        share = default
    return Size(tokens_kept=tokens, share=share, bytes_kept=bytes)


def uniform(tokens: int | None, share: float | None, bytes: int | None) -> Uniform:
    """A uniform budget of what is given, or of a quarter of the prompt."""
    return Uniform(**size(tokens, share, bytes))
