"""Keep keys of small norm: they receive much attention."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from kvjax.cache.policy.base import Policy
from kvjax.cache.policy.seen import Prompt, Slots, Tokens
from kvjax.typing import Array


@dataclasses.dataclass(frozen=True)
class KeyNorm(Policy):
    """score = -|k| (Devoto et al., 2024, "A simple and effective L2 norm-based strategy", arXiv 2406.11430).

    Every token brings its norm along, so that it is that of the exact key in whatever format the key is stored.
    """

    arrives_scored: ClassVar[bool] = True

    def arrival(self, tokens: Tokens) -> Array:
        # Rotation changes no norm (or, with YaRN's amplitude, all by one factor).
        return -jnp.linalg.norm(tokens.unrotated_keys.astype(jnp.float32), axis=-1)

    def prompt_scores(self, prompt: Prompt) -> Array:
        return self.arrival(prompt)

    def slot_scores(self, slots: Slots) -> Array:
        assert slots.stats is not None
        return slots.stats
