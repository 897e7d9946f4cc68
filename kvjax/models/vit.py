"""A vision transformer from the decoder's attention modules: images to the logits of classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from kvjax.attention.base import LayerCacheProtocol
from kvjax.attention.bidirectional import Bidirectional
from kvjax.attention.projection import Projection
from kvjax.errors import UsageError
from kvjax.models.config import Activation
from kvjax.models.layers import ACTIVATIONS
from kvjax.models.vision_config import VisionConfig
from kvjax.typing import Array

__all__ = ["VisionConfig", "VisionTransformer", "patches"]


class VisionTransformer(nn.Module):
    """Patches to tokens with learnt positions, pre-norm layers, one linear classifier.

    Activations have the dtype of the images; norms, softmax and logits are float32.

    Attributes:
      config: sizes and choices.
      dtype: of the parameters that `init` makes.
    """

    config: VisionConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: Array, states: Sequence[Any] | None = None) -> tuple[Array, tuple[Any, ...] | None]:
        """Classifies images.

        Args:
          images: float [B, image_size, image_size, C], of mean about 0.
          states: per layer what stands where a decoder's layer has its cache, such as `MovingNorms` or `Perturbed`
            around `Bidirectional()`; None for attention of all tokens to all.

        Returns:
          logits f32 [B, num_classes], and the next states (None without any).

        Raises:
          UsageError: images of another shape, or not one state per layer; found while tracing.
        """
        config = self.config
        _check(config, images, states)
        x = Projection(
            (config.patch_size**2 * config.channels,), (config.embed_dim,), True, self.dtype, name="patches"
        )(patches(images, config.patch_size))
        if config.pool == "class token":
            token = self.param("class_token", nn.initializers.normal(0.02), (config.embed_dim,), self.dtype)
            front = jnp.broadcast_to(token.astype(x.dtype), (len(x), 1, config.embed_dim))
            x = jnp.concatenate([front, x], axis=1)
        places = self.param("positions", nn.initializers.normal(0.02), (config.tokens, config.embed_dim), self.dtype)
        x = x + places.astype(x.dtype)
        every = None if config.mixer.sees_both_ways else Bidirectional()
        after = []
        for index in range(config.num_layers):
            layer = EncoderLayer(config, index, self.dtype, name=f"layers_{index}")
            x, state = layer(x, every if states is None else states[index])
            after.append(state)
        x = _norm(config, self.dtype, "final_norm", x)
        read = x[:, 0] if config.pool == "class token" else x.mean(1)
        head = Projection((config.embed_dim,), (config.num_classes,), True, self.dtype, name="head")
        return head(read, out_dtype=jnp.float32), None if states is None else tuple(after)


class EncoderLayer(nn.Module):
    """norm, mixer, residual; norm, MLP, residual (layer norms)."""

    config: VisionConfig
    index: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, state: LayerCacheProtocol | None) -> tuple[Array, Any]:
        """x [B, T, D] -> (x [B, T, D], next state)."""
        config = self.config
        mixer = config.mixer.module(config.attention_config(self.index), self.dtype, "attention")
        places = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
        valid = jnp.ones(x.shape[:2], bool)
        mixed, state = mixer(
            _norm(config, self.dtype, "attention_norm", x), positions=places, valid=valid, rope=None, cache=state
        )
        x = x + mixed
        mlp = MLP(config.mlp_dim, config.activation, config.mlp_bias, self.dtype, name="mlp")
        return x + mlp(_norm(config, self.dtype, "mlp_norm", x)), state


class MLP(nn.Module):
    """down(activation(up(x))): [..., D] to [..., D]."""

    mlp_dim: int
    activation: Activation = "gelu"
    use_bias: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        d, f = (x.shape[-1],), (self.mlp_dim,)
        up = Projection(d, f, self.use_bias, self.dtype, name="up")(x)
        return Projection(f, d, self.use_bias, self.dtype, name="down")(ACTIVATIONS[self.activation](up))


def patches(images: Array, size: int) -> Array:
    """[B, S, S, C] to [B, (S / size)², size² · C]: squares row by row, each with its pixels row by row."""
    batch, side, _, channels = images.shape
    grid = images.reshape(batch, side // size, size, side // size, size, channels).swapaxes(2, 3)
    return grid.reshape(batch, (side // size) ** 2, size * size * channels)


def _norm(config: VisionConfig, dtype: Any, name: str, x: Array) -> Array:
    """A layer norm with parameters of `dtype`, computed in float32, returned in the dtype of x."""
    return nn.LayerNorm(config.norm_eps, x.dtype, dtype, use_fast_variance=False, name=name)(x)


def _check(config: VisionConfig, images: Any, states: Sequence[Any] | None) -> None:
    wanted = (config.image_size, config.image_size, config.channels)
    if images.ndim != 4 or images.shape[1:] != wanted or not jnp.issubdtype(images.dtype, jnp.floating):
        raise UsageError(
            f"images is float [B, {', '.join(map(str, wanted))}]; got {images.dtype} {list(images.shape)}."
        )
    if states is not None and len(states) != config.num_layers:
        raise UsageError(f"states has {len(states)} entries for {config.num_layers} layers; give one per layer.")
