"""What a method will allocate, by arithmetic: checked in every run against what the buffers hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp

from kvjax.cache.budget import Budget
from kvjax.cache.layout import CacheDims
from kvjax.cache.method import CacheMethod

_INT = 4  # bytes of a position, a length, a statistic


def layer_bytes(method: CacheMethod, dims: CacheDims) -> int:
    """Bytes of one layer's cache as declared by the method: codes, scales, positions, statistics, counters."""
    method = method.for_layer(dims)
    layout, heads = method.layout(dims), dims.kv_heads
    exact = 2 * heads * dims.head_dim * jnp.dtype(dims.dtype).itemsize + _INT
    coded = (
        heads
        * dims.head_dim
        * sum(c.bits_per_element(dims.head_dim, jnp.dtype(dims.dtype)) for c in (method.keys, method.values))
        / 8
    )
    per_head = method.budget.evicts and method.policy.per_head
    statistic = heads * _INT if method.keeps_statistics else 0
    row = layout.sinks * exact + layout.ring * (exact + statistic)
    row += layout.body * (coded + statistic + _INT * (heads if per_head else 1))
    total = dims.batch * (row + 3 * _INT) + heads * _INT
    assert total == int(total)
    return int(total)


def resolve(method: CacheMethod, layers: Sequence[CacheDims]) -> CacheMethod:
    """Turns a budget in bytes of one row into the largest budget in tokens that fits; other budgets pass unchanged.

    Raises:
      UsageError: not even the sinks and the recent window fit.
    """
    rows = [dataclasses.replace(dims, batch=1) for dims in layers]

    def cost(budget: Budget) -> int:
        return sum(layer_bytes(dataclasses.replace(method, budget=budget), dims) for dims in rows)

    return dataclasses.replace(method, budget=method.budget.resolve(cost, max(dims.max_length for dims in rows)))
