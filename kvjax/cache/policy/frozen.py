"""A choice that is made once, and what Keyformer's release makes of it."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from kvjax.cache.policy.seen import Prompt, Slots
from kvjax.cache.policy.wrapper import AtPromptEnd
from kvjax.typing import Array


@dataclasses.dataclass(frozen=True)
class Frozen(AtPromptEnd):
    """The tokens that win at the end of the prompt stay for ever, and whatever leaves the recent window later is lost.

    So the released code of Keyformer behaves: its mask of key tokens has one place more than there are scores, so that
    the newest token outside the recent window is never a candidate, and masks are only ever multiplied. The token
    that is the newest to compete at the end of the prompt loses therefore, if anything does.
    """

    def prompt_scores(self, prompt: Prompt) -> Array:
        positions, competing = prompt.positions[:, None], prompt.competing
        newest = jnp.max(positions, axis=-1, keepdims=True, where=competing, initial=-1)
        overflows = competing.sum(-1, keepdims=True) > prompt.places[:, None, None]
        return jnp.where(overflows & (positions == newest), -jnp.inf, self.inner.prompt_scores(prompt))

    def slot_scores(self, slots: Slots) -> Array:
        return -slots.positions.astype(jnp.float32)
