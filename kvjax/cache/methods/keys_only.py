"""Methods that look at keys (and values), at no query and no attention."""

from __future__ import annotations

from collections.abc import Callable

from kvjax.cache.method import CacheMethod
from kvjax.cache.methods.size import uniform
from kvjax.cache.policy import KeyDiff, KeyNorm, Lag


def knorm(
    tokens: int | None = None,
    share: float | None = None,
    bytes: int | None = None,
    sinks: int = 0,
    recent: int | float = 1,
    every: int | None = 1,
) -> CacheMethod:
    """Tokens whose keys have the smallest norm.

    Paper: Devoto et al., 2024, "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression" (arXiv
    2406.11430). Cached: keys after rotary embedding and values, exact, besides one float32 per slot and head where
    tokens compete after the prompt. The paper has no sinks and no window; the newest token is kept here, because it has
    not been attended to. In common comparisons only the prompt is compressed (`every=None`).
    """
    budget = uniform(tokens, share, bytes)
    return CacheMethod(name="knorm", budget=budget, policy=KeyNorm(), sinks=sinks, recent=recent, every=every)


def keydiff(
    tokens: int | None = None,
    share: float | None = None,
    bytes: int | None = None,
    sinks: int = 0,
    recent: int | float = 1,
    every: int | None = 1,
) -> CacheMethod:
    """Tokens whose keys point elsewhere than the mean direction of the keys.

    Paper: Park et al., 2025, "KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference in
    Resource-Constrained Environments" (arXiv 2504.15364). Cached: keys after rotary embedding and values, exact, and
    one float32 vector per row and head. After the prompt the mean direction is that of all keys so far, where the paper
    takes the cached ones; at the end of the prompt both are the same. The newest token is kept.
    """
    budget = uniform(tokens, share, bytes)
    return CacheMethod(name="keydiff", budget=budget, policy=KeyDiff(), sinks=sinks, recent=recent, every=every)


def lagkv(
    tokens: int | None = None,
    share: float | None = None,
    bytes: int | None = None,
    sinks: int = 4,
    lag: int = 128,
    recent: int | float | None = None,
) -> CacheMethod:
    """Tokens that stand out against the stretch of text that follows them, as many of every stretch.

    Paper: Liang et al., 2025, "LagKV: Lag-Relative Information of the KV Cache Tells Which Tokens Are Important" (arXiv
    2504.04704). Cached: keys after rotary embedding and values, exact. Stretches of 128 tokens after 4 sinks are the
    paper's. The last whole stretch and what follows it are kept first, as far as the budget goes; `recent` (a stretch
    by default) are kept exactly in any case. Once, at the end of the prompt: the paper goes on in the same way whenever
    decoding has completed a stretch, here decoded tokens are kept.
    """
    return CacheMethod(
        name="lagkv",
        budget=uniform(tokens, share, bytes),
        policy=Lag(lag=lag, sinks=sinks),
        sinks=sinks,
        recent=lag if recent is None else recent,
    )


NAMED: dict[str, Callable[..., CacheMethod]] = {"knorm": knorm, "keydiff": keydiff, "lagkv": lagkv}
