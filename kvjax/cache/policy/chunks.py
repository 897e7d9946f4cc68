"""Keep whole chunks of neighbouring tokens."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from kvjax.cache.policy.seen import Prompt, Slots
from kvjax.cache.policy.wrapper import Wrapper
from kvjax.errors import UsageError
from kvjax.typing import Array


@dataclasses.dataclass(frozen=True)
class Chunks(Wrapper):
    """ChunkKV (Liu et al., 2025, arXiv 2502.00299): a token scores the mean of its chunk, so that chunks stay whole.

    Chunks of `size` tokens are counted from the start of the text; the last may be shorter. What a budget has left over
    after whole chunks goes to the first tokens of the next best one.

    Attributes:
      size: tokens of a chunk. 10 to 20 in the paper; 20 in the widespread release.
    """

    size: int = 20

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UsageError(f"Chunks needs a size of at least 1 token; got {self.size}")

    @property
    def online(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return False  # of what is left of a chunk no mean over the chunk can be taken

    def prompt_scores(self, prompt: Prompt) -> Array:
        scores = self.inner.prompt_scores(prompt)
        tokens = scores.shape[-1]
        padded = ((0, 0), (0, 0), (0, -tokens % self.size))
        scores, valid = (jnp.pad(x, padded) for x in (scores, prompt.valid[:, None]))
        scores, valid = (x.reshape(*x.shape[:2], -1, self.size) for x in (scores, valid))
        total, count = jnp.where(valid, scores, 0.0).sum(-1), valid.sum(-1)
        return jnp.repeat(total / jnp.maximum(count, 1), self.size, axis=-1)[..., :tokens]

    def slot_scores(self, slots: Slots) -> Array:
        raise UsageError("ChunkKV keeps chunks of a prompt; tokens that are decoded later do not compete")
