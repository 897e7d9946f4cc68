"""What a method has to hold, by its own definition: windows and budgets of rows and heads."""

from __future__ import annotations

import dataclasses

from kvjax.cache.budget import Uniform
from kvjax.cache.codec import Identity
from kvjax.cache.layout import CacheDims, ring_slots
from kvjax.cache.method import CacheMethod
from kvjax.cache.selector import ReadAll


def roomy(method: CacheMethod, tokens: int) -> CacheMethod:
    """`method` with a budget that holds `tokens`, everything stored exactly."""
    changes: dict[str, object] = {"keys": Identity(), "values": Identity(), "selector": ReadAll()}
    if method.budget.evicts:
        changes["budget"] = Uniform(tokens_kept=tokens)
    return dataclasses.replace(method, **changes)


def by_head(method: CacheMethod, dims: CacheDims) -> list[CacheMethod]:
    """What each kv head of a layer follows."""
    here = method.for_layer(dims)
    groups = here.by_head(dims) or ((tuple(range(dims.kv_heads)), here),)
    return [next(part for heads, part in groups if head in heads) for head in range(dims.kv_heads)]


def recent_of(method: CacheMethod, prompt: int, padded: int) -> int:
    """The recent window of a row: a number, or a share of the row's budget."""
    if not isinstance(method.recent, float):
        return method.recent
    return max(1, int(method.recent * budget_of(method, prompt, padded)))


def budget_of(method: CacheMethod, prompt: int, padded: int) -> int:
    """The tokens of a row that are kept: of its own prompt where the budget is a share."""
    return method.budget.tokens(prompt if method.budget.relative else padded)


def always_of(method: CacheMethod, prompt: int, padded: int) -> int:
    """What a row may hold however small its budget: sinks, recent window and, of a share, one block to choose."""
    ring = ring_slots(recent_of(method, prompt, padded), method.block)
    return method.sinks + ring + (method.block if method.budget.relative else 0)
