"""The options that every evicting method takes."""

from __future__ import annotations

from kvjax.cache.budget import Uniform

DEFAULT_SHARE = 0.25


def uniform(tokens: int | None, share: float | None, bytes: int | None) -> Uniform:
    """A uniform budget of what is given, or of a quarter of the prompt."""
    if tokens is None and share is None and bytes is None:
        share = DEFAULT_SHARE
    return Uniform(tokens_kept=tokens, share=share, bytes_kept=bytes)
