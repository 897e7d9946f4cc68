"""The words of the recall tasks: single tokens of whatever tokenizer is given, keys and values disjoint."""

from __future__ import annotations

import dataclasses
import re
from typing import Protocol

import numpy as np

from kvjax.errors import UsageError

_WORD = re.compile(r"[Ġ▁]?[A-Za-z]{2,}")
_SPACED = re.compile(r"[Ġ▁][A-Za-z]{3,}")
_ENOUGH = 400
_MOST = 4096


class Encoded(Protocol):
    @property
    def ids(self) -> list[int]: ...


class Tokenizer(Protocol):
    """The part of `tokenizers.Tokenizer` that the tasks use."""

    def get_vocab(self) -> dict[str, int]: ...
    def encode(self, sequence: str, *, add_special_tokens: bool = ...) -> Encoded: ...


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """What a generator needs to know of a tokenizer. All arrays are int32 token ids.

    Attributes:
      size: number of token ids.
      prefix: [P], what every sequence starts with (begin-of-text), or empty.
      frame: [F], stands in front of each record: a line break, which ordinary text is full of, so that a
        record cannot be told from filler before the question is known.
      ask: [A], stands in front of each question.
      keys, values: [W] each, disjoint, single-token words in a fixed random order.
    """

    size: int
    prefix: np.ndarray
    frame: np.ndarray
    ask: np.ndarray
    keys: np.ndarray
    values: np.ndarray

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Vocabulary:
        """Reads the words of a byte-level BPE or SentencePiece tokenizer.

        Whole words behind a space are preferred; where a small vocabulary has too few of them, every
        alphabetic token serves. Raises UsageError when fewer than 32 words are found.
        """
        vocab = tokenizer.get_vocab()
        words = [i for token, i in vocab.items() if _SPACED.fullmatch(token)]
        if len(words) < _ENOUGH:
            words = [i for token, i in vocab.items() if _WORD.fullmatch(token)]
        if len(words) < 32:
            raise UsageError(
                f"the recall tasks need at least 32 alphabetic tokens and this tokenizer has {len(words)}: "
                "use one with words or word pieces"
            )
        order = np.random.default_rng(0).permutation(np.sort(words)[:_MOST]).astype(np.int32)
        half = len(order) // 2

        def ids(text: str) -> np.ndarray:
            return np.asarray(tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

        return cls(
            size=max(vocab.values()) + 1,
            prefix=np.asarray(tokenizer.encode("", add_special_tokens=True).ids, np.int32),
            frame=ids("\n"),
            ask=np.asarray([vocab["<q>"]], np.int32) if "<q>" in vocab else ids("\nQ:"),
            keys=order[:half],
            values=order[half:],
        )
