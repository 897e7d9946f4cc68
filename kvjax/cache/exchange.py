"""What a policy may exchange between devices where the heads of a layer are spread over a mesh.

A cache is local in rows and heads. A policy of scope "layer" joins the scores of all heads of a layer: one sum or mean
over the mesh axis that holds them. `kvjax.sharding` announces that axis while it traces a layer's step.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

import jax

from kvjax.typing import Array

_AXIS: contextvars.ContextVar[str | None] = contextvars.ContextVar("mesh axis of the heads", default=None)


@contextlib.contextmanager
def heads_over(axis: str | None) -> Iterator[None]:
    """While this holds, the heads of what is traced are a shard of a layer's, cut over a mesh axis (None: all)."""
    token = _AXIS.set(axis)
    try:
        yield
    finally:
        _AXIS.reset(token)


def sum_over_heads(x: Array) -> Array:
    """The sum of [B, K, ...] over all kv heads of the layer, wherever they are: [B, 1, ...], equal on all shards."""
    local = x.sum(axis=1, keepdims=True)
    axis = _AXIS.get()
    return local if axis is None else jax.lax.psum(local, axis)


def mean_over_heads(x: Array) -> Array:
    """The mean of [B, K, ...] over all kv heads of the layer, wherever they are: [B, 1, ...], equal on all shards."""
    local = x.mean(axis=1, keepdims=True)
    axis = _AXIS.get()
    return local if axis is None else jax.lax.pmean(local, axis)
