"""Keep random tokens: the baseline that every eviction method has to beat."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from kvjax.cache.policy.base import Policy
from kvjax.cache.policy.seen import Prompt, Slots
from kvjax.errors import UsageError
from kvjax.typing import Array


def hash_uniform(seed: int, head_index: Array, positions: Array) -> Array:
    """Uniform f32 in [0, 1) from (seed, head, position) alone, so that sharding and chunking change nothing.

    The mixing steps are those of MurmurHash3's 32-bit finaliser. head_index int32 [K], positions
    int32 [B, 1 or K, S] -> [B, K, S]. The 24 high bits are used, which float32 holds exactly.
    """
    x = positions.astype(jnp.uint32) * jnp.uint32(0x9E3779B9)
    x = (
        x
        ^ (head_index.astype(jnp.uint32)[:, None] * jnp.uint32(0x85EBCA6B))
        ^ jnp.uint32(seed * 0x27D4EB2F & 0xFFFFFFFF)
    )
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    x = x ^ (x >> 16)
    return (x >> 8).astype(jnp.float32) * jnp.float32(2.0**-24)


@dataclasses.dataclass(frozen=True)
class Random(Policy):
    """A fixed uniform score per (layer, head, position).

    Attributes:
      seed: another seed keeps other tokens.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.seed, int):
            raise UsageError(f"Random: seed is a whole number; got {self.seed!r}")

    def prompt_scores(self, prompt: Prompt) -> Array:
        return hash_uniform(self.seed, prompt.head_index, prompt.positions[:, None])

    def slot_scores(self, slots: Slots) -> Array:
        return hash_uniform(self.seed, slots.head_index, slots.positions)
