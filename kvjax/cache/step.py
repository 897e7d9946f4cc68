"""`Step`: all that attention hands to a cache, and the only thing a cache needs to know of a model."""

from __future__ import annotations

import dataclasses
from typing import Protocol

import chex
import jax
import jax.numpy as jnp

from pallas_kernels.rope import Rope


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Latent:
    """Keys and values that each query head makes of the values: one latent per token for all heads (MLA).

    Query head n meets the keys [up_keys[n]ᵀ · value; key] with the queries [queries; Step.queries], and what it reads
    are the values up_values[n]ᵀ · value. Caches store latent and key, and absorb the maps: the queries become
    up_keys[n] · query, and up_values[n] is applied to what was read.

    Attributes:
      queries: [B, T, N, C]. up_keys: [N, R, C]. up_values: [N, R, C'], R being the channels of `Step.values`.
    """

    queries: jax.Array
    up_keys: jax.Array
    up_values: jax.Array


class Allocation(Protocol):
    """A rule by which query heads choose kv heads while the program runs; a frozen, hashable value."""

    def head_of_query(self, step: Step) -> jax.Array:
        """int32 [B, N], the kv head that each query head reads."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Step:
    """One layer's attention input for T new tokens. What a method does not use disappears under jit.

    Attributes:
      queries: [B, T, N, H], not rotated (after query norm, before rotary embedding).
      keys: [B, T, K, H], not rotated.
      values: [B, T, K, H'], H' being H unless `CacheDims.value_dim` says otherwise.
      positions: int32 [B, T], original positions; in each row they go on from the row's length.
      valid: bool [B, T]; False marks right padding, which is never stored nor read.
      rope: the rotary table, or None for models without one.
      hidden: [B, T, D], the layer's input after its norm, or None.
      output_projection: [N, H', D], or None.
      latent: where values are latents that keys are made of too; then K is 1.
      head_map: int32 [B, N], the kv head that each query head reads where that is data; every kv head then meets all
        queries. None elsewhere.
      scale: multiplies q·k, usually H ** -0.5.
      window: sliding window in tokens (a query at p sees keys at p' with p - p' < window), or None.
      softcap: logits become softcap * tanh(logits / softcap), or None.
      kv_head_of_query: for each of the N query heads the kv head it reads; None means n // G.
      value_part: for each query head, which of P equal parts of its kv head's value channels it reads: K key heads with
        P times as many value heads. None means all of them.
      rotary_dim: how many of the last channels of queries and keys are rotated, once latents have been spelled out;
        None means all, which is what a cache takes.
      allocation: gives the head map of a prompt, which a cache keeps; or None.
      selective: whether tokens hide others from all later queries by the logits of query head 0 (selective attention:
        Leviathan et al., 2024, arXiv 2410.02703).
    """

    queries: jax.Array
    keys: jax.Array
    values: jax.Array
    positions: jax.Array
    valid: jax.Array
    rope: Rope | None = None
    hidden: jax.Array | None = None
    output_projection: jax.Array | None = None
    latent: Latent | None = None
    head_map: jax.Array | None = None
    scale: float = dataclasses.field(default=1.0, metadata={"static": True})
    window: int | None = dataclasses.field(default=None, metadata={"static": True})
    softcap: float | None = dataclasses.field(default=None, metadata={"static": True})
    kv_head_of_query: tuple[int, ...] | None = dataclasses.field(default=None, metadata={"static": True})
    value_part: tuple[int, ...] | None = dataclasses.field(default=None, metadata={"static": True})
    rotary_dim: int | None = dataclasses.field(default=None, metadata={"static": True})
    allocation: Allocation | None = dataclasses.field(default=None, metadata={"static": True})
    selective: bool = dataclasses.field(default=False, metadata={"static": True})

    def check(self, kv_heads: int, head_dim: int, value_dim: int) -> None:
        """Raises AssertionError where a shape or a dtype is not as documented; free under jit."""
        batch, tokens, heads, _ = self.queries.shape
        chex.assert_shape(self.queries, (batch, tokens, heads, head_dim))
        chex.assert_shape(self.keys, (batch, tokens, kv_heads, head_dim))
        chex.assert_shape(self.values, (batch, tokens, kv_heads, value_dim))
        chex.assert_shape([self.positions, self.valid], (batch, tokens))
        chex.assert_equal(self.rotary_dim, None)
        chex.assert_type([self.queries, self.keys, self.values], float)
        chex.assert_type([self.positions, self.valid], [int, jnp.bool_])
        if self.kv_head_of_query is not None:
            chex.assert_equal(len(self.kv_head_of_query), heads)
        elif self.head_map is None and self.allocation is None:
            chex.assert_is_divisible(heads, kv_heads)
        if self.value_part is not None:
            chex.assert_equal(len(self.value_part), heads)
        if self.latent is not None:
            chex.assert_equal(kv_heads, 1)
            chex.assert_shape(self.latent.up_values, (heads, value_dim, None))
