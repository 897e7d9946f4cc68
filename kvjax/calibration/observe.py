"""One pass of the model over a sample, with a look at what each layer's attention is handed, and at its gradients.

Looks are layer caches that keep nothing: attention among the sample's tokens is exact. They are values, so that each
is compiled once; the arrays that they return lie where the model's computation leaves them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from kvjax.cache.layout import CacheDims
from kvjax.cache.policy import Prompt
from kvjax.cache.prompt import attend_prompt
from kvjax.cache.step import Step
from kvjax.engine.prefill import cache_dims
from kvjax.models.language_model import LanguageModel
from kvjax.models.transformer import Transformer
from kvjax.typing import Array, PyTree

Look = Callable[[Prompt], PyTree]
"""What to take from one layer's prompt; hashable, and run under `jit`."""


def model_dims(model: LanguageModel, length: int) -> tuple[CacheDims, ...]:
    """The dimensions of every layer's cache of one row of `length` tokens."""
    return tuple(cache_dims(model, 1, length, length, "float32"))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Looking:
    length: Array
    look: Look = dataclasses.field(metadata={"static": True})

    def step(self, step: Step) -> tuple[Array, PyTree]:
        output, log_sum_exp = attend_prompt(step)
        heads = jnp.arange(step.keys.shape[2], dtype=jnp.int32)
        return output, self.look(Prompt(step, heads, log_sum_exp=log_sum_exp))


def observe(
    model: LanguageModel, look: Look, tokens: NDArray[np.int32], lengths: NDArray[np.int32]
) -> tuple[PyTree, ...]:
    """What `look` takes from each layer when the model reads tokens int32 [B, T], `lengths` [B] of which exist."""
    rows = model.place_rows(tokens), model.place_rows(lengths)
    return _observe(model.module, look, model.params, *rows)


@partial(jax.jit, static_argnames=("module", "look"))
def _observe(module: Transformer, look: Look, params: PyTree, tokens: Array, lengths: Array) -> tuple[PyTree, ...]:
    empty = tuple(_Looking(jnp.zeros_like(lengths), look) for _ in module.config.owners)
    valid = jnp.arange(tokens.shape[1]) < lengths[:, None]
    _, seen = module.apply({"params": params}, tokens, cache=empty, valid=valid, logits_at=lengths - 1)
    return seen  # pyright: ignore[reportReturnType]


class Pair(NamedTuple):
    """Of keys (before rotary embedding) and of values."""

    keys: Any
    values: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Shifted:
    """Adds arrays [B, T, K, H] to keys and values, so that there is something to differentiate by."""

    length: Array
    keys: Array
    values: Array

    def step(self, step: Step) -> tuple[Array, Pair]:
        step = dataclasses.replace(step, keys=step.keys + self.keys, values=step.values + self.values)
        return attend_prompt(step)[0], Pair(step.keys, step.values)


def sensitivities(
    model: LanguageModel, tokens: NDArray[np.int32], lengths: NDArray[np.int32]
) -> tuple[tuple[Pair, ...], tuple[Pair, ...]]:
    """Keys and values of every layer, [B, T, K, H], and the gradients of the language modelling loss by them.

    The loss of a row is the mean surprisal of its tokens behind the first, in nats; rows do not know of each other.
    """
    rows = model.place_rows(tokens), model.place_rows(lengths)
    return _sensitivities(model.module, model.params, *rows)


@partial(jax.jit, static_argnames=("module",))
def _sensitivities(
    module: Transformer, params: PyTree, tokens: Array, lengths: Array
) -> tuple[tuple[Pair, ...], tuple[Pair, ...]]:
    config = module.config
    dtype = params["embed"]["embedding"].dtype
    nothing = [
        Pair(
            *(jnp.zeros((*tokens.shape, shape.kv_heads, width), dtype) for width in (shape.head_dim, shape.value_width))
        )
        for shape in map(config.cache_shape, config.owners)
    ]
    valid = jnp.arange(tokens.shape[1]) < lengths[:, None]

    def loss(shifts: tuple[Pair, ...]) -> tuple[Array, tuple[Pair, ...]]:
        caches = tuple(_Shifted(jnp.zeros_like(lengths), *shift) for shift in shifts)
        logits, seen = module.apply({"params": params}, tokens, cache=caches, valid=valid)
        surprisal = -jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], axis=-1)[..., 0]
        counted = valid[:, 1:]
        means = jnp.where(counted, surprisal, 0.0).sum(-1) / jnp.maximum(counted.sum(-1), 1)
        return means.sum(), seen  # pyright: ignore[reportReturnType]

    gradients, seen = jax.grad(loss, has_aux=True)(tuple(nothing))
    return seen, gradients
