"""A `Transformer` as training takes it: logits, and what losses look at besides."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kvjax.errors import UsageError
from kvjax.models.transformer import Transformer
from kvjax.training.loss import Batch, Forward, Loss, Shown
from kvjax.typing import Array, PyTree


@dataclasses.dataclass(frozen=True, eq=False)
class OfTransformer:
    """A `Forward` that also shows its layers.

    Attributes:
      module: the model.
      draws: uint32 [B], where it draws its embeddings.
    """

    module: Transformer
    draws: Array | None = None

    def __call__(self, params: PyTree, tokens: Array) -> Array:
        """Logits f32 [B, T, V] of tokens int32 [B, T]."""
        return self.probed(params, tokens, None)[0]

    def probed(self, params: PyTree, tokens: Array, probes: tuple[Any, ...] | None) -> tuple[Array, Any]:
        """The logits, and what layer caches (one per layer with keys and values of its own) have become."""
        result: Any = self.module.apply({"params": params}, tokens, cache=probes, draws=self.draws)
        return result

    def states(self, params: PyTree, tokens: Array) -> tuple[Array, ...]:
        """The residual stream behind every layer, [B, T, D] each."""
        result: Any = self.module.apply({"params": params}, tokens, draws=self.draws, method="states")
        return result

    def read_out(self, params: PyTree, state: Array, width: ArrayLike | None = None) -> Array:
        """Logits f32 [B, T, V] of a residual stream, by its first `width` channels after the last norm."""
        result: Any = self.module.apply({"params": params}, state, self.draws, width, method="read_out")
        return result


def of_transformer(forward: Forward, loss: Loss) -> OfTransformer:
    """`forward`, which a loss needs to be an `OfTransformer`. Raises UsageError where it is another function."""
    if isinstance(forward, OfTransformer):
        return forward
    raise UsageError(
        f"{type(loss).__name__} looks into the model's layers, so it needs "
        f"kvjax.training.forward.OfTransformer(module) as the forward function; got {forward!r:.80}."
    )


@dataclasses.dataclass(frozen=True)
class Redrawn(Loss):
    """Another loss, each sequence of each step with embeddings of its own (`DrawnEmbedding`): its mean over draws.

    Attributes:
      inner: the loss.
      seed: of the draws, which depend on the number of the step besides.
    """

    inner: Loss
    seed: int = 0

    def __call__(self, forward: Forward, params: PyTree, batch: Batch, number: ArrayLike) -> tuple[Array, Shown]:
        key = jax.random.fold_in(jax.random.key(self.seed), number)
        draws = jax.random.bits(key, batch["tokens"].shape[:1], jnp.uint32)
        drawn = dataclasses.replace(of_transformer(forward, self), draws=draws)
        return self.inner(drawn, params, batch, number)
