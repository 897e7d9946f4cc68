"""One jitted training step."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from kvjax.training.data import Batch
from kvjax.training.loss import Forward, Loss
from kvjax.typing import Array, PyTree


class Metrics(NamedTuple):
    """f32 scalars, and per family f32 [len(FAMILIES)]."""

    loss: Array
    answer_loss: Array
    text_loss: Array
    grad_norm: Array
    correct: Array
    answers: Array


def make_step(
    forward: Forward, tx: optax.GradientTransformation, loss: Loss
) -> Callable[[PyTree, PyTree, dict[str, Array], ArrayLike], tuple[PyTree, PyTree, Metrics]]:
    """A jitted (params, optimizer state, batch, number of the step) -> (params, optimizer state, Metrics).

    The first two are donated.
    """

    def step(
        params: PyTree, opt_state: PyTree, batch: dict[str, Array], number: ArrayLike
    ) -> tuple[PyTree, PyTree, Metrics]:
        grad = jax.value_and_grad(lambda p: loss(forward, p, batch, number), has_aux=True)
        (total, shown), grads = grad(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        metrics = Metrics(
            total, shown.answer_loss, shown.text_loss, optax.tree.norm(grads), shown.correct, shown.answers
        )
        return optax.apply_updates(params, updates), opt_state, metrics

    return jax.jit(step, donate_argnums=(0, 1))


def on_device(batch: Batch) -> dict[str, Array]:
    """The batch as the step takes it."""
    return {
        "tokens": jnp.asarray(batch.tokens),
        "answer": jnp.asarray(batch.answer),
        "text": jnp.asarray(batch.text),
        "family": jnp.asarray(batch.family),
    }
