"""`Setting`: the shapes of a comparison at one context length, the same for every task and method.

Every row is a prompt of `prompt` tokens and room for `room` more (a question and an answer, or the continuation of a
text), so that one compiled program per method serves all tasks, and all caches are sized alike.
"""

from __future__ import annotations

import dataclasses

from kvjax.cache.layout import CacheDims
from kvjax.engine.prefill import cache_dims
from kvjax.errors import UsageError
from kvjax.evaluation import defaults
from kvjax.models.language_model import LanguageModel

LEAST_PROMPT = 32


@dataclasses.dataclass(frozen=True)
class Setting:
    """Shapes, all static.

    Attributes:
      context: tokens of a row, prompt and room together.
      room: tokens that follow the prompt.
      batch: rows B.
      query_aware: whether the question is the prompt's end, so that methods see it while they compress.
      dtype: of tokens that a cache stores exactly.
      chunk: tokens per step of a streaming prefill.
    """

    context: int
    room: int
    batch: int
    query_aware: bool = False
    dtype: str = "bfloat16"
    chunk: int = defaults.CHUNK

    @property
    def prompt(self) -> int:
        """Tokens of a row's prompt."""
        return self.context - self.room

    def dims(self, model: LanguageModel) -> tuple[CacheDims, ...]:
        """The dimensions of every layer's cache."""
        return tuple(cache_dims(model, self.batch, self.prompt, self.context, self.dtype))

    def has_keys(self, model: LanguageModel) -> bool:
        """Whether the layers of a model keep keys and values, so that there is something for methods to do."""
        return all(layer.convolved is None for layer in self.dims(model))

    def check(self, model: LanguageModel) -> None:
        """Raises UsageError where the context is too long for the model or too short for a prompt."""
        limit = model.config.max_positions
        if self.context > limit:
            raise UsageError(
                f"a context of {self.context} tokens is beyond the {limit} positions of model {model.name!r}. "
                f"Choose a context of at most {limit}, or load a model with a longer one."
            )
        if self.prompt < LEAST_PROMPT:
            raise UsageError(
                f"a context of {self.context} tokens leaves no prompt: {self.room} of them follow it (question and "
                f"answer). Choose a context of at least {self.room + LEAST_PROMPT}."
            )
