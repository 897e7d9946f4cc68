"""Keep what the last queries of the prompt look at."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from kvjax.cache.policy.base import GroupReduce, Policy, check_word
from kvjax.cache.policy.seen import Prompt, Slots
from kvjax.errors import UsageError
from kvjax.typing import Array

Pool = Literal["mean", "max"]


@dataclasses.dataclass(frozen=True)
class Observation(Policy):
    """SnapKV's observation window (Li et al., 2024, section 4).

    The attention of each row's last `window` queries is summed per key, reduced over the G query heads, pooled over
    `kernel` neighbouring positions with stride 1 (zeros beyond the ends and for the window itself, which is always
    kept as the recent window). Scores exist for a prompt only: tokens decoded later are kept.

    Attributes:
      window: queries that vote.
      kernel: odd width of the pooling over positions; 1 pools nothing.
      pool: mean (default) or max.
      reduce: over the G query heads, before pooling.
    """

    online: ClassVar[bool] = False

    window: int = 64
    kernel: int = 5
    pool: Pool = "mean"
    reduce: GroupReduce = "mean"

    def __post_init__(self) -> None:
        check_word(self, "pool", Pool)
        check_word(self, "reduce", GroupReduce)
        if self.window < 1 or self.kernel < 1 or self.kernel % 2 == 0:
            raise UsageError(
                f"Observation needs window >= 1 and an odd kernel >= 1; got {self.window} and {self.kernel}"
            )

    @property
    def least_recent(self) -> int:
        return self.window

    def prompt_scores(self, prompt: Prompt) -> Array:
        mass = prompt.mass(self.reduce, last=self.window)
        before_window = prompt.positions < prompt.lengths[:, None] - self.window
        mass = jnp.where(before_window[:, None], mass, 0.0)
        half = self.kernel // 2
        if self.pool == "max":
            return jax.lax.reduce_window(
                mass, -jnp.inf, jax.lax.max, (1, 1, self.kernel), (1, 1, 1), ((0, 0), (0, 0), (half, half))
            )
        total = jax.lax.reduce_window(
            mass, 0.0, jax.lax.add, (1, 1, self.kernel), (1, 1, 1), ((0, 0), (0, 0), (half, half))
        )
        return total / self.kernel

    def slot_scores(self, slots: Slots) -> Array:
        raise UsageError("SnapKV's scores come from the prompt's last queries and do not exist for decoded tokens")
