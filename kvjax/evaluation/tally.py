"""`Tally`: what one method did on one workload, added up over batches."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvjax.evaluation.workload import Item


@dataclasses.dataclass
class Tally:
    """Sums over rows and graded tokens.

    Attributes:
      right: rows that were answered right. rows: how many there were.
      surprisal: nats of all graded tokens. divergence: Kullback-Leibler from the reference, nats, of all of them.
      tokens: how many were graded. text_bytes: of their text.
      attention_error: relative error of the attention output, per batch on which it was measured, mean over layers.
    """

    right: int = 0
    rows: int = 0
    surprisal: float = 0.0
    divergence: float = 0.0
    tokens: int = 0
    text_bytes: int = 0
    attention_errors: list[float] = dataclasses.field(default_factory=list)

    def add_tokens(self, graded: NDArray[np.bool_], surprisal: NDArray, divergence: NDArray) -> None:
        """A piece's graded tokens; arrays [B, F], surprisal and divergence 0 where not graded."""
        self.tokens += int(graded.sum())
        self.surprisal += float(surprisal.sum(dtype=np.float64))
        self.divergence += float(divergence.sum(dtype=np.float64))

    def add_rows(self, right: NDArray[np.bool_], items: Sequence[Item]) -> None:
        """A batch's rows; right bool [rows]."""
        self.right += int(right.sum())
        self.rows += len(items)
        self.text_bytes += sum(item.text_bytes for item in items)

    def results(self, scored: bool) -> dict[str, Any]:
        """Score or perplexity, and fidelity, as fields of a record; None for all where nothing was added."""
        some = self.tokens > 0
        text = some and not scored
        return {
            "score": self.right / self.rows if some and scored else None,
            "perplexity": math.exp(self.surprisal / self.tokens) if text else None,
            "bits_per_byte": self.surprisal / math.log(2) / self.text_bytes if text else None,
            "kl": self.divergence / self.tokens if some else None,
            "attention_error": float(np.mean(self.attention_errors)) if self.attention_errors else None,
            "examples": self.rows,
        }
