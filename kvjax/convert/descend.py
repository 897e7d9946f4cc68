"""Adam on a few arrays: the training of factors, networks and gates."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import jax
import optax

from kvjax.typing import Array, PyTree

WARMUP, COOLDOWN = 0.1, 0.2


def descend(
    loss: Callable[[PyTree, PyTree], Array],
    start: PyTree,
    data: Iterator[PyTree],
    steps: int,
    rate: float,
    *,
    within: tuple[float, float] | None = None,
    done: Callable[[float], None] = lambda loss: None,
) -> PyTree:
    """`start` after `steps` of AdamW without decay of weights, on the mean of `loss(params, one of data)`.

    The rate rises over the first tenth of the steps and falls over the last fifth.

    Args:
      within: where every number is kept, after each step. done: called after each step with its loss.
    """
    rates = optax.warmup_constant_schedule(0.0, rate, max(1, round(WARMUP * steps)))
    fall = max(1, round(COOLDOWN * steps))
    schedule = optax.join_schedules([rates, optax.linear_schedule(rate, 0.0, fall)], [steps - fall])
    optimiser = optax.adamw(schedule, weight_decay=0.0)

    @jax.jit
    def step(params: PyTree, state: PyTree, one: PyTree) -> tuple[PyTree, PyTree, Array]:
        value, gradients = jax.value_and_grad(loss)(params, one)
        updates, state = optimiser.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        if within is not None:
            params = optax.projections.projection_box(params, *within)
        return params, state, value

    params, state = start, optimiser.init(start)
    for _, one in zip(range(steps), data, strict=False):
        params, state, value = step(params, state, one)
        done(float(value))
    return params
