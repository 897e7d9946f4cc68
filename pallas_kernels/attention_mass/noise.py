"""Gumbel noise for logits as a pure function of (key, query head, query position, key position).

No number depends on how the work is cut: not on the row of the batch, the shard, the chunk or the slot. A threefry
hash (`jax.random`) gives every (query head, query position) a seed of 64 bits; per key, a finaliser of 32 bits mixes
the seed with the key's position, in a dozen integer operations that are the same on every platform.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

_FIRST, _SECOND = (int(np.uint32(x).astype(np.int32)) for x in (0x85EBCA6B, 0xC2B2AE35))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GumbelNoise:
    """Independent draws of Gumbel(0, 1), one per (query head, query position, key position).

    Attributes:
      key: uint32 [2], as `jax.random.key_data` of a threefry key.
      head_index: int32 [K], the number of each kv head in the whole model (not in the shard); query head g of it draws
        as head `head_index * G + g`.
    """

    key: jax.Array
    head_index: jax.Array

    def seeds(self, query_positions: jax.Array, groups: int) -> tuple[jax.Array, jax.Array]:
        """Two words per query: int32 [B, K, G, T] each, for query positions [B, T] and G = `groups`."""
        key = jax.random.wrap_key_data(self.key, impl="threefry2x32")
        heads = self.head_index[:, None] * groups + jnp.arange(groups, dtype=jnp.int32)

        def seed(head: jax.Array, position: jax.Array) -> jax.Array:
            return jax.random.key_data(jax.random.fold_in(jax.random.fold_in(key, head), position))

        over_tokens = jax.vmap(jax.vmap(seed, (None, 0)), (None, 0))
        words = jax.vmap(jax.vmap(over_tokens, (0, None)), (0, None))(heads, query_positions)
        words = jax.lax.bitcast_convert_type(jnp.moveaxis(words, 2, 0), jnp.int32)
        return words[..., 0], words[..., 1]

    def at(self, query_positions: jax.Array, key_positions: jax.Array, groups: int) -> jax.Array:
        """f32 [B, K, G, T, S] for query positions int32 [B, T] and key positions int32 [B, S] or [B, K or 1, S]."""
        first, second = self.seeds(query_positions, groups)
        if key_positions.ndim == 2:
            key_positions = key_positions[:, None]
        return gumbel(first[..., None], second[..., None], key_positions[:, :, None, None])


def gumbel(first: jax.Array, second: jax.Array, positions: jax.Array) -> jax.Array:
    """The draw for a query's two seed words and a key's position, all int32 and of shapes that broadcast; f32."""

    def fold(x: jax.Array, bits: int) -> jax.Array:
        return x ^ jax.lax.shift_right_logical(x, jnp.full_like(x, bits))

    mixed = fold(positions ^ first, 16) * _FIRST
    mixed = fold(fold(mixed, 13) ^ second, 16) * _SECOND
    mixed = fold(mixed, 16)
    # 23 bits and a half: exact in float32, never 0 and never 1.
    whole = jax.lax.shift_right_logical(mixed, jnp.full_like(mixed, 9)).astype(jnp.float32)
    uniform = (whole + 0.5) * 2.0**-23
    # -log(1 - u), by its series where u is small: the largest draws come from there, and not every log is exact near 1.
    series = uniform * (1.0 + uniform * (1 / 2 + uniform * (1 / 3 + uniform * (1 / 4))))
    exponential = jnp.where(uniform < 2.0**-5, series, -jnp.log(1.0 - uniform))
    return -jnp.log(exponential)
