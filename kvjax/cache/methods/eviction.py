"""The methods that every comparison needs: everything, random tokens, the newest tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from kvjax.cache.method import CacheMethod
from kvjax.cache.methods.size import uniform
from kvjax.cache.policy import Random, Recency


def full() -> CacheMethod:
    """Every token, exactly: the reference of every comparison.

    Paper: none.
    """
    return CacheMethod(name="full")


def random(
    tokens: int | None = None, share: float | None = None, bytes: int | None = None, sinks: int = 4, seed: int = 0
) -> CacheMethod:
    """Random tokens of the prompt, besides sinks and a recent window of a quarter of the budget.

    Paper: none; the floor that an eviction method has to beat. Decoded tokens are kept.
    """
    return CacheMethod(
        name="random", budget=uniform(tokens, share, bytes), policy=Random(seed=seed), sinks=sinks, recent=0.25
    )


def streaming_llm(
    tokens: int | None = None,
    share: float | None = None,
    bytes: int | None = None,
    sinks: int = 4,
    positions: Literal["original", "renumbered"] = "original",
) -> CacheMethod:
    """Sinks and the newest tokens; all that leaves the window is forgotten, also while decoding.

    Paper: Xiao et al., 2023, "Efficient Streaming Language Models with Attention Sinks" (arXiv 2309.17453). The paper
    renumbers positions inside the cache (`positions=renumbered`); most comparisons keep the original ones (default).
    """
    return CacheMethod(
        name="streaming_llm",
        budget=uniform(tokens, share, bytes),
        policy=Recency(),
        sinks=sinks,
        recent=0.25,
        every=1,
        positions=positions,
    )


NAMED: dict[str, Callable[..., CacheMethod]] = {"full": full, "random": random, "streaming_llm": streaming_llm}
