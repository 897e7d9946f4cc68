"""Keep the newest tokens (StreamingLLM's window; sliding-window attention)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from kvjax.cache.policy.base import Policy
from kvjax.cache.policy.seen import Prompt, Slots
from kvjax.typing import Array


@dataclasses.dataclass(frozen=True)
class Recency(Policy):
    """score = position. With sinks this is StreamingLLM (Xiao et al., 2023, section 3.2)."""

    per_head: ClassVar[bool] = False

    def prompt_scores(self, prompt: Prompt) -> Array:
        return prompt.positions[:, None].astype(jnp.float32)

    def slot_scores(self, slots: Slots) -> Array:
        return slots.positions.astype(jnp.float32)
