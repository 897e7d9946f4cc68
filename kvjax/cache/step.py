"""`Step`: all that attention hands to a cache, and the only thing a cache needs to know of a model."""

from __future__ import annotations

import dataclasses

import chex
import jax
import jax.numpy as jnp

from pallas_kernels.rope import Rope


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Step:
    """One layer's attention input for T new tokens. What a method does not use disappears under jit.

    Attributes:
      queries: [B, T, N, H], not rotated (after query norm, before rotary embedding).
      keys: [B, T, K, H], not rotated.
      values: [B, T, K, H].
      positions: int32 [B, T], original positions; in each row they go on from the row's length.
      valid: bool [B, T]; False marks right padding, which is never stored nor read.
      rope: the rotary table, or None for models without one.
      hidden: [B, T, D], the layer's input after its norm, or None.
      output_projection: [N, H, D], or None.
      scale: multiplies q·k, usually H ** -0.5.
      window: sliding window in tokens (a query at p sees keys at p' with p - p' < window), or None.
      softcap: logits become softcap * tanh(logits / softcap), or None.
      kv_head_of_query: for each of the N query heads the kv head it reads; None means n // G.
    """

    queries: jax.Array
    keys: jax.Array
    values: jax.Array
    positions: jax.Array
    valid: jax.Array
    rope: Rope | None = None
    hidden: jax.Array | None = None
    output_projection: jax.Array | None = None
    scale: float = dataclasses.field(default=1.0, metadata={"static": True})
    window: int | None = dataclasses.field(default=None, metadata={"static": True})
    softcap: float | None = dataclasses.field(default=None, metadata={"static": True})
    kv_head_of_query: tuple[int, ...] | None = dataclasses.field(default=None, metadata={"static": True})

    def check(self, kv_heads: int, head_dim: int) -> None:
        """Raises AssertionError where a shape or a dtype is not as documented; free under jit."""
        batch, tokens, heads, _ = self.queries.shape
        chex.assert_shape(self.queries, (batch, tokens, heads, head_dim))
        chex.assert_shape([self.keys, self.values], (batch, tokens, kv_heads, head_dim))
        chex.assert_shape([self.positions, self.valid], (batch, tokens))
        chex.assert_type([self.queries, self.keys, self.values], float)
        chex.assert_type([self.positions, self.valid], [int, jnp.bool_])
        if self.kv_head_of_query is None:
            chex.assert_is_divisible(heads, kv_heads)
        else:
            chex.assert_equal(len(self.kv_head_of_query), heads)
