"""After the prompt the token at a fixed distance from the newest goes, whatever its score (ElasticCache, PrefixKV)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from kvjax.cache.policy.seen import Prompt, Slots
from kvjax.cache.policy.wrapper import AtPromptEnd
from kvjax.errors import UsageError
from kvjax.typing import Array


@dataclasses.dataclass(frozen=True)
class FixedPlace(AtPromptEnd):
    """Another policy's choice at the end of the prompt; after it the token with `distance` newer ones loses its place.

    The released code of PrefixKV (Wang et al., 2024, arXiv 2412.03409) does so, by a rule of ElasticCache's. Importance
    is not looked at any more. Where fewer tokens compete the oldest of them goes (the release: the middle one).

    Attributes:
      distance: competing tokens that are newer than the one that goes; sinks and recent window do not compete.
    """

    distance: int = 24

    def __post_init__(self) -> None:
        if self.distance < 0:
            raise UsageError(f"FixedPlace: distance is at least 0; got {self.distance}")

    def prompt_scores(self, prompt: Prompt) -> Array:
        return self.inner.prompt_scores(prompt)

    def slot_scores(self, slots: Slots) -> Array:
        positions, most = slots.positions, jnp.iinfo(jnp.int32).max
        place = jax.lax.top_k(positions, min(self.distance + 1, positions.shape[-1]))[0][..., -1:]
        oldest = jnp.min(positions, axis=-1, keepdims=True, where=positions >= 0, initial=most)
        return -(positions == jnp.maximum(place, oldest)).astype(jnp.float32)
