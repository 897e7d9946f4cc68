"""Keep what the newest query looks at."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from kvjax.cache.policy.base import GroupReduce, Policy
from kvjax.cache.policy.seen import Prompt, Slots
from kvjax.typing import Array


@dataclasses.dataclass(frozen=True)
class LastAttention(Policy):
    """score = the attention that each row's newest query pays, summed over the query heads of a kv head.

    `OverHeads(LastAttention())` is TOVA (Oren et al., 2024, arXiv 2401.06104).
    """

    forgets: ClassVar[bool] = True

    @property
    def mass_reduce(self) -> GroupReduce:
        return "sum"

    def prompt_scores(self, prompt: Prompt) -> Array:
        return prompt.mass("sum", last=1)

    def slot_scores(self, slots: Slots) -> Array:
        assert slots.stats is not None
        return slots.stats
