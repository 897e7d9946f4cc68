"""The discrete key-value bottleneck (Träuble et al., 2023, arXiv 2207.11240): a head that is trained where it is read.

Features of a frozen encoder fetch, from each of C codebooks, the value that belongs to the nearest of its frozen keys;
the mean of what was fetched is decoded. Only fetched values get gradients, so what one task writes hardly touches what
others have read.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp

from kvjax.attention.projection import Projection
from kvjax.errors import UsageError
from kvjax.models.codebook import Codebooks, nearest
from kvjax.typing import Array, PyTree

Decoder = Literal["softmax", "linear"]


@dataclasses.dataclass(frozen=True)
class BottleneckConfig:
    """Sizes of the head.

    Attributes:
      classes: of the labels.
      codebooks, pairs: C, J.
      decoder: "softmax" has no parameters: values have a channel per class, start at zero, and their mean is the
        logits. "linear" maps the mean of values of `value_dim` channels, which start as N(0, 1), to logits.
      value_dim: channels of a value with a linear decoder.

    Raises:
      UsageError: a size below 1 or an unknown decoder.
    """

    classes: int
    codebooks: int = 64
    pairs: int = 64
    decoder: Decoder = "softmax"
    value_dim: int = 16

    def __post_init__(self) -> None:
        if min(self.classes, self.codebooks, self.pairs, self.value_dim) < 1:
            raise UsageError(f"sizes of a bottleneck must be at least 1, got {self}.")
        if self.decoder not in get_args(Decoder):
            raise UsageError(f"unknown decoder {self.decoder!r}; one of {', '.join(get_args(Decoder))}.")


class Bottleneck(nn.Module):
    """Features to logits. Keys are data, not parameters: nothing here can train them.

    Attributes:
      config: sizes and the decoder.
      dtype: of the parameters `values` [C, J, classes or value_dim] and `decoder` at initialisation.
    """

    config: BottleneckConfig
    dtype: Any = jnp.float32

    def setup(self) -> None:
        config = self.config
        linear = config.decoder == "linear"
        init = nn.initializers.normal(1.0) if linear else nn.initializers.zeros
        shape = (config.codebooks, config.pairs, config.value_dim if linear else config.classes)
        self.values = self.param("values", init, shape, self.dtype)
        self.decoder = Projection((config.value_dim,), (config.classes,), True, self.dtype) if linear else None

    def __call__(self, features: Array, codebooks: Codebooks) -> Array:
        """features [B, E] to logits f32 [B, classes]."""
        return self.read(nearest(codebooks, jax.lax.stop_gradient(features)))

    def read(self, index: Array) -> Array:
        """The same from what `nearest` has found, int32 [B, C]: while encoder and keys are frozen, once is enough."""
        fetched = self.values[jnp.arange(self.config.codebooks), index]  # [B, C, V]
        mean = jnp.mean(fetched, axis=1, dtype=jnp.float32)
        return mean if self.decoder is None else self.decoder(mean, jnp.float32)


def loss(logits: Array, labels: Array) -> Array:
    """Mean cross-entropy in nats of logits f32 [B, classes] and labels int32 [B]."""
    picked = jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - picked)


@functools.partial(jax.jit, static_argnames=("config",))
def train_values(
    config: BottleneckConfig, params: PyTree, index: Array, labels: Array, rate: float | Array
) -> tuple[PyTree, Array]:
    """One step of plain gradient descent, and the loss before it: values and decoder move, keys cannot.

    An optimizer with momentum would go on moving values that nothing fetches any more, which is forgetting.

    Args:
      index: int32 [B, C] of `kvjax.models.codebook.nearest`. labels: int32 [B].
      rate: each fetched value gets its share of 1 / C, so good rates grow with C.
    """

    def of(params: PyTree) -> Array:
        return loss(Bottleneck(config).apply({"params": params}, index, method="read"), labels)  # pyright: ignore[reportArgumentType]

    value, gradient = jax.value_and_grad(of)(params)
    return jax.tree.map(lambda p, g: (p - rate * g).astype(p.dtype), params, gradient), value
