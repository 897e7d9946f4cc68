"""Losses that order what a model knows: by channels, so that the first of them suffice, and by layers."""

from __future__ import annotations

import dataclasses
import functools
import operator

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kvjax.errors import UsageError
from kvjax.training.forward import OfTransformer, of_transformer
from kvjax.training.loss import Batch, Forward, Loss, NextToken, Shown
from kvjax.typing import Array, PyTree

NEXT_TOKEN = NextToken()


@dataclasses.dataclass(frozen=True)
class Matryoshka(Loss):
    """The sum over nested widths m of c_m times the loss of the first m channels, read by the first m of the head.

    Matryoshka representation learning (Kusupati et al., 2022, arXiv 2205.13147), with one head for all widths (MRL-E):
    L = sum of c_m * CE(W[:, :m] z[:m]), z being the last layer's output after the last norm. The log shows the last
    width's. Every width costs a product with the whole head.

    Attributes:
      widths: m, ascending; the last is usually D.
      weights: c_m; () means 1 for each.
      each: the loss of one width.
    """

    widths: tuple[int, ...]
    weights: tuple[float, ...] = ()
    each: NextToken = NEXT_TOKEN

    def __post_init__(self) -> None:
        _check_widths(self)
        if self.weights and len(self.weights) != len(self.widths):
            raise UsageError(f"Matryoshka: {len(self.weights)} weights for {len(self.widths)} widths; give one each")

    def __call__(self, forward: Forward, params: PyTree, batch: Batch, number: ArrayLike) -> tuple[Array, Shown]:
        model = of_transformer(forward, self)
        _check_model(self, model)
        state = model.states(params, batch["tokens"][:, :-1])[-1]
        parts = [self.each.of_logits(model.read_out(params, state, width), batch) for width in self.widths]
        weights = self.weights or (1.0,) * len(parts)
        loss = functools.reduce(operator.add, (c * one for c, (one, _) in zip(weights, parts, strict=True)))
        return loss, parts[-1][1]


@dataclasses.dataclass(frozen=True)
class Matryoshka2D(Loss):
    """The last layer and one random earlier layer, each at all channels and at a random width, and their agreement.

    After "2D Matryoshka Sentence Embeddings" (Li et al., 2024, arXiv 2402.14776), carried over to next tokens:

      L = CE(last) + CE(last[:m]) + layer_weight * (CE(l) + CE(l[:m'])) + agreement * KL(last || l)

    with a layer l below the last and widths m, m' that are drawn uniformly in each step; the KL is between next-token
    distributions at all channels, and no gradient flows through the last layer's. Layers are read through the last
    norm and the one head. Both weights, the direction of the KL and the stopped gradient are unverified: the
    description at hand was from memory. The log shows the last layer at all channels.

    Attributes:
      widths: m, of which one is drawn for either layer.
      layer_weight, agreement: see above.
      each: the loss of one layer and width.
      seed: of the draws.
    """

    widths: tuple[int, ...]
    layer_weight: float = 1.0
    agreement: float = 1.0
    each: NextToken = NEXT_TOKEN
    seed: int = 0

    def __post_init__(self) -> None:
        _check_widths(self)

    def __call__(self, forward: Forward, params: PyTree, batch: Batch, number: ArrayLike) -> tuple[Array, Shown]:
        model = of_transformer(forward, self)
        _check_model(self, model)
        layers = model.module.config.num_layers
        if layers < 2:
            raise UsageError("Matryoshka2D: a model of one layer has no earlier one; use Matryoshka")
        states = model.states(params, batch["tokens"][:, :-1])
        layer, *widths = self.drawn(layers, number)
        earlier = jnp.stack(states[:-1])[layer]
        logits = [
            model.read_out(params, state, width)
            for state, mine in ((states[-1], widths[0]), (earlier, widths[1]))
            for width in (None, mine)
        ]
        (full, shown), (narrow, _), *below = (self.each.of_logits(one, batch) for one in logits)
        last, other = jax.nn.log_softmax(jax.lax.stop_gradient(logits[0])), jax.nn.log_softmax(logits[2])
        apart = self.each.of_tokens(jnp.sum(jnp.exp(last) * (last - other), axis=-1), batch)
        loss = full + narrow + self.layer_weight * (below[0][0] + below[1][0]) + self.agreement * apart
        return loss, shown

    def drawn(self, layers: int, number: ArrayLike) -> tuple[Array, Array, Array]:
        """int32: the earlier layer, the last layer's width and the earlier one's, of one step."""
        keys = jax.random.split(jax.random.fold_in(jax.random.key(self.seed), number), 3)
        widths = jnp.array(self.widths, jnp.int32)
        layer = jax.random.randint(keys[0], (), 0, layers - 1)
        last, earlier = (widths[jax.random.randint(key, (), 0, len(self.widths))] for key in keys[1:])
        return layer, last, earlier


def _check_widths(loss: Matryoshka | Matryoshka2D) -> None:
    widths = loss.widths
    if not widths or widths[0] < 1 or list(widths) != sorted(set(widths)):
        raise UsageError(f"{type(loss).__name__}: widths are ascending numbers of channels, from 1 on; got {widths}")


def _check_model(loss: Matryoshka | Matryoshka2D, model: OfTransformer) -> None:
    if loss.widths[-1] > (most := model.module.config.embed_dim):
        raise UsageError(f"{type(loss).__name__}: a width of {loss.widths[-1]}, but the model has {most} channels")
