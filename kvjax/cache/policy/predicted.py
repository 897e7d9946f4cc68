"""Keep what a small network expects to matter, from the layer's input alone."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from kvjax.cache.layout import CacheDims
from kvjax.cache.policy.base import Policy
from kvjax.cache.policy.seen import Prompt, Slots, Tokens
from kvjax.errors import UsageError
from kvjax.typing import Array, PyTree


@dataclasses.dataclass(frozen=True)
class Predicted(Policy):
    """KVzap (Jegou and Jeblick, 2026): the logarithm of KVzip's score, predicted from the input of the layer.

    Every token brings its prediction along, so that tokens compete at any time and no attention is looked at. One
    network per layer, an output per kv head: linear, or one hidden layer with GELU (erf) between.

    Data (f32): `kernel` [1, K, D or M] and `bias` [1, K]; with a hidden layer also `hidden_kernel` [1, 1, D, M] and
    `hidden_bias` [1, 1, M].

    Attributes:
      hidden: M, units of the hidden layer; 0 is the linear network. 512 in the paper.
    """

    arrives_scored: ClassVar[bool] = True
    calibrated: ClassVar[bool] = True

    hidden: int = 0

    def __post_init__(self) -> None:
        if self.hidden < 0:
            raise UsageError(f"Predicted: hidden units are 0 (linear) or more; got {self.hidden}")

    def parameter_shapes(self, dims: CacheDims) -> PyTree:
        shapes = {"kernel": (1, dims.kv_heads, self.hidden or dims.width), "bias": (1, dims.kv_heads)}
        if self.hidden:
            shapes |= {"hidden_kernel": (1, 1, dims.width, self.hidden), "hidden_bias": (1, 1, self.hidden)}
        return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}

    def arrival(self, tokens: Tokens) -> Array:
        x = tokens.step.hidden
        if x is None:
            raise UsageError("Predicted needs the input of the layer: pass it to `attend`, or as Step.hidden")
        return predict(tokens.data, x)

    def prompt_scores(self, prompt: Prompt) -> Array:
        return self.arrival(prompt)

    def slot_scores(self, slots: Slots) -> Array:
        assert slots.stats is not None
        return slots.stats


def predict(data: PyTree, x: Array) -> Array:
    """The network: x [B, T, D] of any floating dtype -> f32 [B, K, T]; data as in `Predicted`."""
    if "hidden_kernel" in data:
        kernel, bias = data["hidden_kernel"][0, 0], data["hidden_bias"][0, 0]
        x = jax.nn.gelu(
            jnp.einsum("btd,dm->btm", x, kernel.astype(x.dtype), preferred_element_type=jnp.float32) + bias,
            approximate=False,
        )
    kernel, bias = data["kernel"][0], data["bias"][0]
    out = jnp.einsum("btd,kd->bkt", x, kernel.astype(x.dtype), preferred_element_type=jnp.float32)
    return out + bias[:, None]
