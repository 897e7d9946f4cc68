"""Keep the tokens that others have hidden least."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from kvjax.cache.hiding import of_prompt
from kvjax.cache.policy.base import Policy
from kvjax.cache.policy.seen import Prompt, Slots
from kvjax.errors import UsageError
from kvjax.typing import Array


@dataclasses.dataclass(frozen=True)
class Hidden(Policy):
    """score_j = -F_j, by how much the logits of the next query are lowered at token j; the same in all heads.

    For models with selective attention (Leviathan et al., 2024, arXiv 2410.02703), whose own accumulator this is: no
    statistic is kept for it. A row's first token is never hidden, so it always wins a place.
    """

    per_head: ClassVar[bool] = False
    needs_hiding: ClassVar[bool] = True

    def prompt_scores(self, prompt: Prompt) -> Array:
        if not prompt.step.selective:
            raise _no_hiding()
        return -of_prompt(prompt.step)[:, None]

    def slot_scores(self, slots: Slots) -> Array:
        if slots.hiding is None:
            raise _no_hiding()
        return -slots.hiding


def _no_hiding() -> UsageError:
    return UsageError(
        "Hidden scores tokens by what others hide, which only selective attention knows. Use another policy, or a "
        "model whose attention is SelectiveAttention()."
    )
