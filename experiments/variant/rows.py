"""What the variants learn from: text, and records of which the values are asked for later."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from numpy.typing import NDArray

from kvjax.training.data import KV, REPEAT, TEXT, Batch
from kvjax.training.schedule import Stage

KEYS, VALUES = 32, 4
RECORDS = KEYS * VALUES
SYMBOLS = RECORDS + KEYS + VALUES
"""Tokens of their own, behind those of the text: one per record, one per key that asks, one per answer.

A key and its value share a token, so that one lookup finds the answer. Where they are two tokens, models of this size
stay at "some value of this sequence" for millions of tokens.
"""
TOLD_ONCE, TOLD_AGAIN = KV, REPEAT
"""The family of a row (an index into `kvjax.training.data.FAMILIES`): whether each key stands
once, or four times on average, of which the last value holds."""


@dataclasses.dataclass(frozen=True)
class Rows:
    """Batches of which every fourth row is text, and the others are records followed by questions.

    Attributes:
      corpus: int32 [n], text. prefix: tokens before every row. first: the first of the `SYMBOLS` token ids.
      seed, batch_tokens: as of `kvjax.training.data.Batches`.
    """

    corpus: NDArray[np.int32]
    prefix: tuple[int, ...]
    first: int
    seed: int
    batch_tokens: int

    def batch(self, step: int, stage: Stage) -> Batch:
        """The batch of this step, of sequences of `stage.length` tokens."""
        rng = np.random.default_rng([self.seed, step])
        kinds = (TEXT, TOLD_ONCE, TOLD_AGAIN, rng.choice([TOLD_ONCE, TOLD_AGAIN]))
        family = np.resize(kinds, max(4, self.batch_tokens // stage.length)).astype(np.int32)
        size = stage.length + 1 - len(self.prefix)
        rows = [self._text(rng, size) if kind == TEXT else self._records(rng, size, kind) for kind in family.tolist()]
        tokens, answer, text = (np.stack(column) for column in zip(*rows, strict=True))
        before = np.broadcast_to(np.array(self.prefix, np.int32), (len(family), len(self.prefix)))
        blank = np.zeros(before.shape, bool)
        return Batch(
            np.concatenate([before, tokens], axis=1, dtype=np.int32),
            np.concatenate([blank, answer], axis=1),
            np.concatenate([blank, text], axis=1),
            family,
        )

    def _text(self, rng: np.random.Generator, size: int) -> tuple[NDArray[np.integer], ...]:
        start = int(rng.integers(0, len(self.corpus) - size))
        return self.corpus[start : start + size], np.zeros(size, bool), np.ones(size, bool)

    def _records(self, rng: np.random.Generator, size: int, kind: int) -> tuple[NDArray[np.integer], ...]:
        """Records of 2 to KEYS - 1 keys, log-uniform (few teach the lookup, many ask for capacity), then questions."""
        most = min(KEYS, size // 4)
        keys = rng.permutation(KEYS)[: int(2 ** rng.uniform(1, math.log2(most)))]
        told = keys if kind == TOLD_ONCE else rng.choice(keys, min(4 * len(keys), size // 2))
        values = rng.integers(0, VALUES, len(told))
        held = dict(zip(told.tolist(), values.tolist(), strict=True))
        number = (size - len(told)) // 2
        rounds = [rng.permutation(np.array(list(held))) for _ in range(-(-number // len(held)))]
        asked = np.concatenate(rounds)[:number]
        answers = np.array([held[key] for key in asked.tolist()])
        questions = np.stack([RECORDS + asked, RECORDS + KEYS + answers], axis=1).ravel()
        tokens = self.first + np.concatenate([told * VALUES + values, questions])
        place = np.arange(size)
        answer = (place >= len(told)) & ((place - len(told)) % 2 == 1) & (place < len(tokens))
        return np.pad(tokens, (0, size - len(tokens)), mode="edge"), answer, np.zeros(size, bool)
