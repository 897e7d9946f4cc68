"""The parts of a decoder layer beside attention."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from kvjax.attention.base import LayerCacheProtocol
from kvjax.attention.norm import RMSNorm
from kvjax.attention.projection import Projection
from kvjax.models.config import Activation, TransformerConfig
from kvjax.typing import Array
from pallas_kernels.rope import Rope

ACTIVATIONS: Mapping[Activation, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


class GatedMLP(nn.Module):
    """down(activation(gate(x)) * up(x)) (Shazeer, 2020, arXiv 2002.05202): [..., D] to [..., D]."""

    mlp_dim: int
    activation: Activation = "silu"
    use_bias: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        d, f = (x.shape[-1],), (self.mlp_dim,)
        gate = Projection(d, f, self.use_bias, self.dtype, name="gate")(x)
        up = Projection(d, f, self.use_bias, self.dtype, name="up")(x)
        return Projection(f, d, self.use_bias, self.dtype, name="down")(ACTIVATIONS[self.activation](gate) * up)


class DecoderLayer(nn.Module):
    """norm, attention, residual; norm, MLP, residual; with norms on both outputs where `sandwich_norm`."""

    config: TransformerConfig
    index: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Array, *, positions: Array, valid: Array, rope: Rope | None, cache: LayerCacheProtocol | None
    ) -> tuple[Array, Any]:
        """x [B, T, D] -> (x [B, T, D], next layer cache or None)."""
        config = self.config
        attention = config.attention_of(self.index).module(config.attention_config(self.index), self.dtype, "attention")
        mlp = GatedMLP(config.mlp_dim, config.activation, config.mlp_bias, self.dtype, name="mlp")
        attended, cache = attention(
            self._norm("attention_norm")(x), positions=positions, valid=valid, rope=rope, cache=cache
        )
        x = x + self._output_norm("attention_output_norm", attended)
        x = x + self._output_norm("mlp_output_norm", mlp(self._norm("mlp_norm")(x)))
        return x, cache

    def _norm(self, name: str) -> RMSNorm:
        return RMSNorm(self.config.norm_eps, self.config.norm_offset, self.dtype, name=name)

    def _output_norm(self, name: str, x: Array) -> Array:
        return self._norm(name)(x) if self.config.sandwich_norm else x
