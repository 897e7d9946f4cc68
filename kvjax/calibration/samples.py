"""`Samples`: the sequences that a model is run on to find what a method must know of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from kvjax.engine.prefill import pad
from kvjax.engine.request import Prompt, as_rows
from kvjax.errors import UsageError
from kvjax.models.language_model import LanguageModel

LEAST = 16
"""Tokens of the shortest sequence that says anything."""


@dataclasses.dataclass(frozen=True, eq=False)
class Samples:
    """Sequences padded on the right.

    Attributes:
      tokens: int32 [n, T]. lengths: int32 [n], all T unless a text was shorter.
    """

    tokens: NDArray[np.int32]
    lengths: NDArray[np.int32]

    @classmethod
    def of(cls, model: LanguageModel, text: Prompt | Sequence[Prompt], count: int, length: int) -> Samples:
        """At most `count` windows of `length` tokens, evenly spread over texts (or rows of token ids), none twice.

        A window of a text starts with what the tokenizer puts before a text; rows of ids are taken as they are. A text
        that is shorter than a window is one sample.

        Raises:
          UsageError: neither text nor ids, or too little of it.
        """
        if count < 1 or not LEAST <= length <= model.config.max_positions:
            raise UsageError(
                f"calibration takes at least one sample of {LEAST} to {model.config.max_positions} tokens (the "
                f"positions of model {model.name!r}); got {count} of {length}"
            )
        texts = [text] if isinstance(text, str) else text
        plain = len(texts) > 0 and isinstance(texts[0], str)
        prefix = model.tokenizer.encode("", special=True) if plain else []
        size = length - len(prefix)
        windows = [
            [*prefix, *row[start : start + size]]
            for row in as_rows(model, text, special=False)
            for start in range(0, max(len(row) - size, 0) + 1, size)
        ]
        windows = [window for window in windows if len(window) >= LEAST]
        if not windows:
            raise UsageError(f"the text for calibration has fewer than {LEAST} tokens; give some thousands")
        chosen = np.unique(np.linspace(0, len(windows) - 1, min(count, len(windows))).round().astype(int))
        rows = [windows[index] for index in chosen]
        return cls(*pad(rows, max(map(len, rows))))

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def length(self) -> int:
        """T."""
        return self.tokens.shape[1]

    def batches(self, size: int) -> Iterator[tuple[NDArray[np.int32], NDArray[np.int32]]]:
        """Tokens int32 [size, T] and lengths int32 [size]; the last batch may be smaller."""
        for start in range(0, len(self), size):
            yield self.tokens[start : start + size], self.lengths[start : start + size]
