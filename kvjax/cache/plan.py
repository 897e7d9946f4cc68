"""What a method will allocate, by arithmetic: checked in every run against what the buffers hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp

from kvjax.cache.budget import Budget
from kvjax.cache.convolution_state import ConvolutionState
from kvjax.cache.layout import CacheDims
from kvjax.cache.method import CacheMethod
from kvjax.cache.pool import page_slots, pool_pages
from kvjax.errors import UsageError

_INT = 4  # bytes of a position, a length, a statistic


def layer_bytes(method: CacheMethod, dims: CacheDims) -> int:
    """Bytes of one layer's cache as declared by the method: codes, scales, positions, statistics, counters."""
    method = method.for_layer(dims)
    if dims.convolved is not None:
        return ConvolutionState.planned(dims)
    if groups := method.by_head(dims):
        each = [(part, dataclasses.replace(dims, kv_heads=len(heads))) for heads, part in groups]
        return sum(layer_bytes(part, mine) for part, mine in each)
    layout, heads = method.layout(dims), dims.kv_heads
    pairs = tuple(zip(method.codecs, (dims, dims.of_values), strict=True))
    exact = heads * (dims.head_dim + dims.of_values.head_dim) * jnp.dtype(dims.dtype).itemsize + _INT
    coded = heads * sum(mine.head_dim * codec.bits_per_element(mine) for codec, mine in pairs) / 8
    per_head = method.budget.evicts and method.policy.per_head
    statistic = heads * _INT if method.keeps_statistics else 0
    pooled = layout.kept if method.budget.pooled else 0
    row = layout.sinks * exact + layout.ring * (exact + statistic)
    row += (layout.body - pooled) * (coded + statistic + _INT * (heads if per_head else 1))
    if pooled:
        page = page_slots(dims, pooled, *method.codecs)
        row += pool_pages(dims, pooled, page) * (page * (coded / heads + _INT) + _INT)
    total = dims.batch * (row + 3 * _INT) + heads * _INT + _state_bytes(method, dims)
    total += sum(codec.parameter_bytes(mine) for codec, mine in pairs) if layout.body else 0
    total += _INT * dims.batch * (dims.max_length * dims.selective + dims.query_heads * dims.mapped)
    assert total == int(total)
    return int(total)


def _state_bytes(method: CacheMethod, dims: CacheDims) -> int:
    """What policy, fate and selector keep."""
    page = method.selector.page
    index = jax.eval_shape(lambda: method.selector.index(dims, method.layout(dims).body // page)) if page else None
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(index))
    if not method.budget.evicts:
        return total
    shapes = jax.eval_shape(
        lambda: (
            method.policy.initial_state(dims),
            method.fate.aside(dims, method.layout(dims), method.policy.per_head),
        )
    )
    leaves = jax.tree.leaves((shapes, method.policy.parameter_shapes(dims) if method.policy.calibrated else None))
    return total + sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def full_bytes(layers: Iterable[CacheDims]) -> int:
    """Bytes of the keys and values of max_length tokens in bfloat16: what ratios refer to."""
    return sum(2 * d.batch * d.kv_heads * (d.head_dim + d.of_values.head_dim) * d.max_length for d in layers)


def resolve(method: CacheMethod, layers: Sequence[CacheDims]) -> CacheMethod:
    """Turns a budget in bytes of one row into the largest budget in tokens that fits; other budgets pass unchanged.

    Raises:
      UsageError: not even the sinks and the recent window fit.
    """
    limit, longest = method.budget.bytes_kept, max(dims.max_length for dims in layers)
    if limit is None:
        return method
    rows = [dataclasses.replace(dims, batch=1) for dims in layers]

    def cost(budget: Budget) -> int:
        return sum(layer_bytes(dataclasses.replace(method, budget=budget), dims) for dims in rows)

    fitting, low, high = None, 1, longest
    while low <= high:
        middle = method.budget.with_tokens((low + high) // 2)
        try:
            fits, possible = cost(middle) <= limit, True
        except UsageError:  # too few tokens for the sinks and the recent window
            fits, possible = True, False
        if fits:
            fitting = middle if possible else fitting
            low = (low + high) // 2 + 1
        else:
            high = (low + high) // 2 - 1
    if fitting is None:
        raise UsageError(
            f"{limit} bytes per row hold neither the sinks and the recent window nor the slots for decoded tokens; all "
            f"tokens take {cost(method.budget.with_tokens(longest))} bytes"
        )
    return dataclasses.replace(method, budget=fitting)
