"""What all attention modules have in common: sizes, the cache they talk to, and the kind that makes them."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, Protocol

import flax.linen as nn
import jax.numpy as jnp

from kvjax.attention.norm import RMSNorm
from kvjax.attention.projection import Projection
from kvjax.cache.prompt import attend_prompt
from kvjax.cache.step import Step
from kvjax.typing import Array
from pallas_kernels.rope import Rope


class LayerCacheProtocol(Protocol):
    """What attention needs of a layer's cache."""

    def step(self, step: Step) -> tuple[Array, Any]:
        """Stores the new tokens and attends: (out [B, T, N, H], the layer's next cache)."""
        ...


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """What a model tells the attention of one of its layers.

    Attributes:
      num_heads, num_kv_heads, head_dim: N, K, H.
      scale: multiplies q·k.
      window: sliding window in tokens, or None.
      softcap: cap of the attention logits, or None.
      kv_head_of_query: see `Step`.
      qkv_bias, output_bias: biases of the projections.
      qk_norm: RMS norm over head_dim of queries and keys, before rotary embedding.
      norm_eps, norm_offset: of norms.
      layer, layers: index of the layer, and L.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None
    softcap: float | None = None
    kv_head_of_query: tuple[int, ...] | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    norm_eps: float = 1e-6
    norm_offset: float = 0.0
    layer: int = 0
    layers: int = 1


@dataclasses.dataclass(frozen=True)
class CacheShape:
    """What the attention of a layer makes its cache hold per token; see `CacheDims`."""

    kv_heads: int
    head_dim: int
    value_dim: int | None = None
    latent: bool = False
    selective: bool = False
    mapped: bool = False
    convolved: int | None = None

    @property
    def value_width(self) -> int:
        """Channels of a value."""
        return self.head_dim if self.value_dim is None else self.value_dim


class AttentionKind(abc.ABC):
    """A variant of attention as a value: a frozen dataclass with the variant's own settings.

    A model has one; its field `TransformerConfig.attention` names it, and checkpoints and records spell it. A new
    variant is one file with its kind and its module.
    """

    @abc.abstractmethod
    def module(self, config: AttentionConfig, dtype: Any, name: str) -> nn.Module:
        """The attention of one layer; called as `AttentionModule.__call__` says."""

    @abc.abstractmethod
    def cache_shape(self, config: AttentionConfig) -> CacheShape:
        """What a layer's cache holds."""

    def rotary_dim(self, config: AttentionConfig) -> int:
        """Channels that rotary embedding turns."""
        return config.head_dim

    @property
    def sees_both_ways(self) -> bool:
        """Whether modules see what follows a token by themselves; others do by `Bidirectional` in a cache's place."""
        return False

    @property
    def shares_layers(self) -> bool:
        """Whether a layer can read another's keys and values (`TransformerConfig.kv_layers`)."""
        return False

    def spelled_out(self, config: AttentionConfig) -> AttentionKind:
        """The same variant without settings that stand for others, so that two can be compared."""
        del config
        return self

    def check(self, config: AttentionConfig) -> None:
        """Raises UsageError where the variant does not go with a layer's sizes."""
        return


class AttentionModule(nn.Module):
    """Projections and norms that variants share. Subclasses hand one `Step` to the cache, or attend among the tokens.

    Attributes:
      config: sizes and choices.
      dtype: of the parameters at initialisation.
    """

    config: AttentionConfig
    dtype: Any = jnp.float32

    def __call__(
        self,
        x: Array,
        *,
        positions: Array,
        valid: Array,
        rope: Rope | None,
        cache: LayerCacheProtocol | None = None,
    ) -> tuple[Array, Any]:
        """x [B, T, D], positions int32 [B, T], valid bool [B, T] -> (out [B, T, D], next layer cache or None)."""
        raise NotImplementedError

    def heads(self, name: str, heads: int, head_dim: int, embed_dim: int) -> Projection:
        """A projection to heads, [..., D] to [..., heads, head_dim]."""
        return Projection((embed_dim,), (heads, head_dim), use_bias=self.config.qkv_bias, dtype=self.dtype, name=name)

    def output(self, heads: int, head_dim: int, embed_dim: int) -> Projection:
        """The projection of what heads have read, [..., heads, head_dim] to [..., D]."""
        bias = self.config.output_bias
        return Projection((heads, head_dim), (embed_dim,), use_bias=bias, dtype=self.dtype, name="o")

    def attended(
        self, x: Array, output: Projection, cache: LayerCacheProtocol | None, *, scale: float, **fields: Any
    ) -> tuple[Array, Any]:
        """(out [B, T, D], next layer cache): hands the cache a step, and projects what heads have read.

        Args:
          x: [B, T, D], the layer's input. output: what `output` has made.
          scale: multiplies q·k. fields: of `Step`, all that x, the projection and the config do not say.
        """
        step = Step(
            hidden=x,
            output_projection=output.kernel,
            scale=scale,
            window=self.config.window,
            softcap=self.config.softcap,
            **fields,
        )
        out, cache = attend(step, cache)
        return output(out), cache

    def normed(self, q: Array, k: Array) -> tuple[Array, Array]:
        """Queries and keys after their norms, where the model has any."""
        return (self.norm("q_norm")(q), self.norm("k_norm")(k)) if self.config.qk_norm else (q, k)

    def norm(self, name: str) -> RMSNorm:
        """An RMS norm over the last axis."""
        return RMSNorm(self.config.norm_eps, self.config.norm_offset, self.dtype, name=name)


def attend(step: Step, cache: LayerCacheProtocol | None) -> tuple[Array, Any]:
    """(out [B, T, N, H'], next layer cache): attention to what a cache holds, or without one among the tokens alone."""
    return (attend_prompt(step)[0], None) if cache is None else cache.step(step)
