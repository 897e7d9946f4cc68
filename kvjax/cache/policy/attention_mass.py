"""Keep the tokens that have received the most attention so far (heavy hitters)."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from kvjax.cache.policy.base import GroupReduce, Policy, check_word
from kvjax.cache.policy.seen import Prompt, Slots
from kvjax.typing import Array


@dataclasses.dataclass(frozen=True)
class AttentionMass(Policy):
    """score_j = sum over queries i >= j of softmax(q·k)_ij, per kv head (H2O, Zhang et al., 2023, section 4).

    Attributes:
      reduce: over the G query heads of a kv head.
      mean_over_queries: divide by the number of queries that could see the token, which removes the head start of
        early tokens (not in the paper; "observed attention" elsewhere).
    """

    reduce: GroupReduce = "sum"
    mean_over_queries: bool = False

    def __post_init__(self) -> None:
        check_word(self, "reduce", GroupReduce)

    @property
    def mass_reduce(self) -> GroupReduce:
        return self.reduce

    def prompt_scores(self, prompt: Prompt) -> Array:
        return self._normalised(prompt.mass(self.reduce), prompt.positions[:, None], prompt.lengths)

    def slot_scores(self, slots: Slots) -> Array:
        assert slots.stats is not None
        return self._normalised(slots.stats, slots.positions, slots.seen)

    def _normalised(self, mass: Array, positions: Array, seen: Array) -> Array:
        if not self.mean_over_queries:
            return mass
        return mass / jnp.maximum(seen[:, None, None] - positions, 1)
