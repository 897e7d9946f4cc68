"""Keep what the model looks at when it repeats the prompt."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from kvjax.cache.policy.base import Policy, Repetition
from kvjax.cache.policy.seen import Prompt, Slots
from kvjax.errors import UsageError
from kvjax.typing import Array


@dataclasses.dataclass(frozen=True)
class Given(Policy):
    """score = `Prompt.scores`, from a pass of the engine's (KVzip: Kim et al., 2025, arXiv 2505.23416).

    Attributes:
      repetition: that pass.
    """

    online: ClassVar[bool] = False

    repetition: Repetition = Repetition()  # pyright: ignore[reportIncompatibleVariableOverride]

    def prompt_scores(self, prompt: Prompt) -> Array:
        if prompt.scores is None:
            raise UsageError(
                "this method's scores come from a pass of their own over the model: prefill with the engine"
            )
        return prompt.scores

    def slot_scores(self, slots: Slots) -> Array:
        raise UsageError("scores that were given with a prompt do not exist for decoded tokens")
