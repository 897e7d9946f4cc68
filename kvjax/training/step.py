"""The loss and one jitted training step."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from kvjax.training.data import FAMILIES, Batch
from kvjax.typing import Array, PyTree

#: (params, tokens int32 [B, T]) -> logits f32 [B, T, V]
Forward = Callable[[PyTree, Array], Array]
TEXT_WEIGHT = 0.5


class Metrics(NamedTuple):
    """f32 scalars, and per family f32 [len(FAMILIES)]."""

    loss: Array
    answer_loss: Array
    text_loss: Array
    grad_norm: Array
    correct: Array
    answers: Array


def losses(forward: Forward, params: PyTree, batch: dict[str, Array]) -> tuple[Array, tuple[Array, ...]]:
    """Mean over answers + TEXT_WEIGHT * mean over text, in nats per token, and what Metrics shows."""
    tokens = batch["tokens"]
    logits = forward(params, tokens[:, :-1])
    targets = tokens[:, 1:]
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    nats = jax.nn.logsumexp(logits, axis=-1) - picked
    answer = batch["answer"][:, 1:].astype(jnp.float32)
    text = batch["text"][:, 1:].astype(jnp.float32)
    answer_loss = jnp.sum(nats * answer) / jnp.maximum(jnp.sum(answer), 1.0)
    text_loss = jnp.sum(nats * text) / jnp.maximum(jnp.sum(text), 1.0)
    hits = (jnp.argmax(logits, axis=-1) == targets) * answer
    member = jax.nn.one_hot(batch["family"], len(FAMILIES))
    correct, answers = hits.sum(1) @ member, answer.sum(1) @ member
    return answer_loss + TEXT_WEIGHT * text_loss, (answer_loss, text_loss, correct, answers)


def make_step(
    forward: Forward, tx: optax.GradientTransformation
) -> Callable[[PyTree, PyTree, dict[str, Array]], tuple[PyTree, PyTree, Metrics]]:
    """A jitted (params, optimizer state, batch) -> (params, optimizer state, Metrics); the first two are donated."""

    def step(params: PyTree, opt_state: PyTree, batch: dict[str, Array]) -> tuple[PyTree, PyTree, Metrics]:
        grad = jax.value_and_grad(lambda p: losses(forward, p, batch), has_aux=True)
        (loss, (answer_loss, text_loss, correct, answers)), grads = grad(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        metrics = Metrics(loss, answer_loss, text_loss, optax.global_norm(grads), correct, answers)
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
