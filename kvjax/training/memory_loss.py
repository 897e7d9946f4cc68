"""A loss that has selective attention hide more, so that fewer tokens need to be kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kvjax.cache.hiding import over_prompt
from kvjax.cache.prompt import attend_prompt
from kvjax.cache.step import Step
from kvjax.errors import UsageError
from kvjax.training.forward import of_transformer
from kvjax.training.loss import Batch, Forward, Loss, NextToken, Shown
from kvjax.typing import Array, PyTree

NEXT_TOKEN = NextToken()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Counted:
    """How many tokens each query of a layer still needs.

    counts: f32 [B, T], 0 on padding. length: f32 [B], of the rows.
    """

    counts: Array
    length: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SoftCount:
    """Stands where a layer's cache does: attends among the tokens alone, and returns their soft counts (`Counted`).

    Attributes:
      length: int32 [B] of zeros, for the positions.
      tau: how far a token is hidden when it counts as gone.
    """

    length: Array
    tau: float = dataclasses.field(default=1.0, metadata={"static": True})

    def step(self, step: Step) -> tuple[Array, Counted]:
        """The output [B, T, N, H] and M(n) = sum over the tokens s that query n sees of clamp(1 - F[n, s] / tau, 0, 1).

        Raises:
          UsageError: the step's tokens hide nothing.
        """
        if not step.selective:
            raise UsageError("soft counts are of selective attention; use a model with attention=SelectiveAttention().")

        def remaining(hidden: Array, sees: Array) -> Array:
            return jnp.where(sees, jnp.clip(1.0 - hidden / self.tau, 0.0, 1.0), 0.0).sum(-1)

        counts = over_prompt(step, remaining)[1]
        assert counts is not None
        return attend_prompt(step)[0], Counted(counts, step.valid.sum(-1).astype(jnp.float32))


def memory(layers: Sequence[Counted]) -> Array:
    """f32 scalar in (0, 1]: the mean over layers of a row's largest soft count, divided by its length; over rows."""
    most = jnp.stack([layer.counts.max(-1) for layer in layers]).mean(0)
    return jnp.mean(most / jnp.maximum(layers[0].length, 1.0))


@dataclasses.dataclass(frozen=True)
class MemoryLoss(Loss):
    """The loss of the next token + weight * (mean over layers of max over n of M(n)) / n.

    For models with selective attention (Leviathan et al., 2024, arXiv 2410.02703): it asks every layer for a small
    largest number of tokens that are not hidden yet. The formula is unverified: the description at hand was from
    memory.

    Attributes:
      weight: the epsilon of the paper.
      tau: see `SoftCount`.
      each: the loss of the next token.
    """

    weight: float
    tau: float = 1.0
    each: NextToken = NEXT_TOKEN

    def __call__(self, forward: Forward, params: PyTree, batch: Batch, number: ArrayLike) -> tuple[Array, Shown]:
        model, tokens = of_transformer(forward, self), batch["tokens"][:, :-1]
        probe = SoftCount(jnp.zeros(tokens.shape[:1], jnp.int32), self.tau)
        logits, layers = model.probed(params, tokens, (probe,) * len(model.module.config.owners))
        loss, shown = self.each.of_logits(logits, batch)
        return loss + self.weight * memory(layers), shown
