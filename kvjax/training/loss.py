"""What training minimises, as a value: the plain loss of the next token, which others build on."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kvjax.training.data import FAMILIES
from kvjax.typing import Array, PyTree

#: (params, tokens int32 [B, T]) -> logits f32 [B, T, V]
Forward = Callable[[PyTree, Array], Array]
Batch = Mapping[str, Array]


class Shown(NamedTuple):
    """What the log shows beside the loss: f32 scalars, and per family f32 [len(FAMILIES)]."""

    answer_loss: Array
    text_loss: Array
    correct: Array
    answers: Array


class Loss(abc.ABC):
    """A frozen dataclass with one method."""

    @abc.abstractmethod
    def __call__(self, forward: Forward, params: PyTree, batch: Batch, number: ArrayLike) -> tuple[Array, Shown]:
        """The loss, a f32 scalar in nats per token, and what the log shows.

        Args:
          forward: the model; a loss may need one that can do more (`kvjax.training.forward`).
          batch: of `kvjax.training.step.on_device`.
          number: int32, of the step; all that is drawn at random is a function of it.
        """


@dataclasses.dataclass(frozen=True)
class NextToken(Loss):
    """Mean over answers + text_weight * mean over text, of the cross entropy of the next token."""

    text_weight: float = 0.5

    def __call__(self, forward: Forward, params: PyTree, batch: Batch, number: ArrayLike) -> tuple[Array, Shown]:
        return self.of_logits(forward(params, batch["tokens"][:, :-1]), batch)

    def of_logits(self, logits: Array, batch: Batch) -> tuple[Array, Shown]:
        """The loss of logits f32 [B, T - 1, V] for the tokens [B, T] of a batch."""
        targets = batch["tokens"][:, 1:]
        picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        answer_loss, text_loss = means(jax.nn.logsumexp(logits, axis=-1) - picked, batch)
        answer = batch["answer"][:, 1:].astype(jnp.float32)
        hits = (jnp.argmax(logits, axis=-1) == targets) * answer
        member = jax.nn.one_hot(batch["family"], len(FAMILIES))
        correct, answers = hits.sum(1) @ member, answer.sum(1) @ member
        return answer_loss + self.text_weight * text_loss, Shown(answer_loss, text_loss, correct, answers)

    def of_tokens(self, nats: Array, batch: Batch) -> Array:
        """The mean of something else per token, f32 [B, T - 1], with the weights of the loss."""
        answer, text = means(nats, batch)
        return answer + self.text_weight * text


def means(nats: Array, batch: Batch) -> tuple[Array, Array]:
    """The means over answers and over text of f32 [B, T - 1]."""
    answer = batch["answer"][:, 1:].astype(jnp.float32)
    text = batch["text"][:, 1:].astype(jnp.float32)
    answer_loss = jnp.sum(nats * answer) / jnp.maximum(jnp.sum(answer), 1.0)
    text_loss = jnp.sum(nats * text) / jnp.maximum(jnp.sum(text), 1.0)
    return answer_loss, text_loss
