"""Keep tokens that differ from the stretch of text that follows them."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from kvjax.cache.policy.base import Policy
from kvjax.cache.policy.seen import Prompt, Slots, ranks
from kvjax.errors import UsageError
from kvjax.typing import Array


@dataclasses.dataclass(frozen=True)
class Lag(Policy):
    """LagKV (Liang et al., 2025, arXiv 2504.04704): no attention, only keys and values of the next stretch.

    After `sinks` tokens the prompt is cut into stretches of `lag`. Channels are shifted and scaled to the least and the
    largest number in the *next* stretch; a token's number is the standard deviation over its channels, softmaxed within
    its stretch; keys' and values' are averaged. The score is the rank within the stretch over `lag`, so that every
    stretch gives up as much. The last whole stretch and what follows it have nothing to be compared with: they score
    above all others, newest first.

    Attributes:
      lag: tokens of a stretch. 128 in the paper.
      sinks: tokens before the first stretch; they score above all.
    """

    online: ClassVar[bool] = False

    lag: int = 128
    sinks: int = 4

    def __post_init__(self) -> None:
        if self.lag < 1 or self.sinks < 0:
            raise UsageError(f"Lag needs lag >= 1 and sinks >= 0; got {self.lag} and {self.sinks}")

    def prompt_scores(self, prompt: Prompt) -> Array:
        positions = prompt.positions[:, None]
        stretch = (positions - self.sinks) // self.lag
        compared = (positions >= self.sinks) & (self.sinks + (stretch + 2) * self.lag <= prompt.lengths[:, None, None])
        uncompared = jnp.where(positions < self.sinks, jnp.inf, 1.0 + positions)
        stretches = (positions.shape[-1] - self.sinks) // self.lag
        if stretches < 2:
            return jnp.broadcast_to(uncompared, prompt.keys.shape[:3])
        mean = (self._deviation(prompt.keys, stretches) + self._deviation(prompt.values, stretches)) / 2
        rank = ranks(mean).astype(jnp.float32) / self.lag
        rank = rank.reshape(*rank.shape[:2], -1)
        after = positions.shape[-1] - self.sinks - rank.shape[-1]
        return jnp.where(compared, jnp.pad(rank, ((0, 0), (0, 0), (self.sinks, after))), uncompared)

    def _deviation(self, x: Array, stretches: int) -> Array:
        """f32 [B, K, stretches - 1, lag] of x [B, K, T, H]."""
        cut = x[:, :, self.sinks : self.sinks + stretches * self.lag].astype(jnp.float32)
        cut = cut.reshape(*x.shape[:2], stretches, self.lag, x.shape[-1])
        ahead, here = cut[:, :, 1:], cut[:, :, :-1]
        least, most = (f(axis=3, keepdims=True) for f in (ahead.min, ahead.max))
        scaled = (here - least) / jnp.where(most > least, most - least, 1.0)
        return jax.nn.softmax(scaled.std(axis=-1, ddof=1), axis=-1)

    def slot_scores(self, slots: Slots) -> Array:
        raise UsageError(
            "LagKV compares a stretch of a prompt with the next one; decoded tokens do not come in stretches"
        )
