"""Keep what a pass of its own over the model has scored."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from kvjax.cache.policy.base import Policy
from kvjax.cache.policy.seen import Prompt, Slots
from kvjax.errors import UsageError
from kvjax.typing import Array


@dataclasses.dataclass(frozen=True)
class Given(Policy):
    """score = `Prompt.scores`.

    KVzip (Kim et al., 2025, arXiv 2505.23416) makes them: the model, with the full cache, is asked to repeat the text,
    chunk by chunk; a token's score is the largest attention that a query of the repetition pays it.
    """

    online: ClassVar[bool] = False

    def prompt_scores(self, prompt: Prompt) -> Array:
        if prompt.scores is None:
            raise UsageError(
                "this method's scores come from a pass of their own over the model: prefill with the engine"
            )
        return prompt.scores

    def slot_scores(self, slots: Slots) -> Array:
        raise UsageError("scores that were given with a prompt do not exist for decoded tokens")
