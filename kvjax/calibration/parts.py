"""The parts of a method that finders find something for."""

from __future__ import annotations

import dataclasses
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from kvjax.cache.budget import Budget, HeadTable
from kvjax.cache.codec import Codec
from kvjax.cache.layout import CacheDims
from kvjax.cache.method import CacheMethod
from kvjax.errors import UsageError

Kind = TypeVar("Kind", bound=Codec)
Codecs = tuple[Kind | None, Kind | None]
"""Of keys and of values."""


def codecs_of(method: CacheMethod, kind: type[Kind], dims: tuple[CacheDims, ...]) -> tuple[Codecs[Kind], ...]:
    """Per layer its codecs of keys and values that are a `kind`, None for others."""

    def mine(codec: Codec) -> Kind | None:
        return codec if isinstance(codec, kind) else None

    layers = [method.for_layer(layer) for layer in dims]
    return tuple((mine(layer.keys), mine(layer.values)) for layer in layers)


def any_codec(method: CacheMethod, kind: type[Codec], dims: tuple[CacheDims, ...]) -> bool:
    """Whether any layer has such a codec."""
    return any(codec is not None for pair in codecs_of(method, kind, dims) for codec in pair)


def whole_and_cut(budgets: tuple[Budget, ...]) -> tuple[int, int]:
    """Of the two budgets of a table: which keeps everything, and which does not.

    Raises:
      UsageError: there are not two such budgets.
    """
    whole = [index for index, budget in enumerate(budgets) if not budget.evicts]
    if len(budgets) != 2 or len(whole) != 1:
        raise UsageError(f"a table is found for two budgets, one of which keeps every token; this one has {budgets}")
    return whole[0], 1 - whole[0]


def head_table(method: CacheMethod, chosen: NDArray[np.bool_]) -> CacheMethod:
    """The method with the table that keeps everything in the kv heads that `chosen` bool [L, K] names."""
    assert isinstance(method.budget, HeadTable)
    whole, cut = whole_and_cut(method.budget.budgets)
    table = tuple(tuple(whole if head else cut for head in layer) for layer in chosen)
    return dataclasses.replace(method, budget=dataclasses.replace(method.budget, table=table))


def spelled_heads(chosen: NDArray[np.bool_]) -> str:
    """Which heads bool [L, K] names, in words."""
    layers = [f"layer {n}: {' '.join(map(str, np.flatnonzero(row)))}" for n, row in enumerate(chosen) if row.any()]
    return "; ".join(layers) or "none"
