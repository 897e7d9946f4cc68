"""Lanes: the independent (row, head) problems of an attention op, and how many of them run at once.

On a CPU an op is fast while what it works on stays in the second-level cache, so lanes are visited a few at a time
by a loop. An accelerator wants all lanes in one batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

CACHE_BYTES = 1 << 20
"""Working set aimed at per step on a CPU; half of a common second-level cache."""


def divisor_at_most(number: int, limit: int) -> int:
    """The largest divisor of `number` that is at most `limit` (and at least 1)."""
    return next(d for d in range(max(1, min(number, limit)), 0, -1) if number % d == 0)


def over_lanes(function: Callable[..., Any], args: Any, together: int) -> Any:
    """`function(*args)`, computed for a few lanes at a time on a CPU and in one call elsewhere.

    Args:
      function: takes `args` and returns a pytree; every leaf of both leads with the lane axis, of any length.
      args: a tuple of pytrees with at least one leaf.
      together: the most lanes per call on a CPU.
    """
    lanes = jax.tree.leaves(args)[0].shape[0]
    if jax.default_backend() != "cpu":
        together = lanes
    width = divisor_at_most(lanes, together)
    if width == lanes:
        return function(*args)
    steps = jax.tree.map(lambda x: x.reshape(lanes // width, width, *x.shape[1:]), args)
    out = jax.lax.map(lambda step: function(*step), steps)
    return jax.tree.map(lambda x: x.reshape(lanes, *x.shape[2:]), out)
