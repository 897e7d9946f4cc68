"""A context, the questions that it can answer, and the scores of what a model generates."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from kvjax.errors import UsageError
from kvjax.tasks.words import Vocabulary


@dataclasses.dataclass(frozen=True)
class Turn:
    """One question about a context.

    Attributes:
      question: int32 [Q], begins with the vocabulary's `ask`.
      answer: int32 [A], what greedy decoding right behind the question must give.
      items: lengths of the answer's parts; they add up to A.
      depth: where the (first) record asked for begins, as a share of the context in [0, 1).
      ordered: False when the parts may come in any order (then they have one length).
    """

    question: np.ndarray
    answer: np.ndarray
    items: tuple[int, ...]
    depth: float
    ordered: bool = True

    def __len__(self) -> int:
        return len(self.question) + len(self.answer)


@dataclasses.dataclass(frozen=True)
class Scene:
    """A context and at least one turn; every turn stands for itself.

    Attributes:
      context: int32 [C], the vocabulary's prefix included.
      filler: bool [C], True on tokens of ordinary text.
      turns: the questions.
    """

    context: np.ndarray
    filler: np.ndarray
    turns: tuple[Turn, ...]


@dataclasses.dataclass(frozen=True)
class Example:
    """One context with one question: the unit of evaluation. Arrays as in `Scene` and `Turn`."""

    task: str
    context: np.ndarray
    question: np.ndarray
    answer: np.ndarray
    items: tuple[int, ...]
    depth: float
    ordered: bool = True


def score(example: Example, generated: Sequence[int] | np.ndarray) -> float:
    """1.0 when the generated tokens begin with the whole answer (its items in any order, if unordered), else 0.0."""
    return float(recall(example, generated) == 1.0)


def recall(example: Example, generated: Sequence[int] | np.ndarray) -> float:
    """Share of the answer's items that stand, whole and in place, in the generated tokens; in [0, 1].

    Where the order is free, place does not count, and an item that is said twice counts once.
    """
    wanted = _cut(example.answer, example.items)
    said = _cut(generated, example.items)
    if example.ordered:
        return float(np.mean([one == two for one, two in zip(wanted, said, strict=True)]))
    return len(set(wanted) & set(said)) / len(wanted)


def _cut(tokens: Sequence[int] | np.ndarray, items: tuple[int, ...]) -> list[tuple[int, ...]]:
    ends = np.cumsum(items)
    return [tuple(int(token) for token in tokens[end - size : end]) for end, size in zip(ends, items, strict=True)]


def occurrences(sequence: np.ndarray, pattern: np.ndarray) -> np.ndarray:
    """Start indices (int [n], ascending) at which `pattern` occurs in `sequence`."""
    if len(pattern) > len(sequence):
        return np.zeros(0, np.int64)
    hit = np.ones(len(sequence) - len(pattern) + 1, bool)
    for i, token in enumerate(pattern):
        hit &= sequence[i : i + len(hit)] == token
    return np.flatnonzero(hit)


def weave(
    rng: np.random.Generator, vocabulary: Vocabulary, records: Sequence[np.ndarray], filler: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Spreads framed records over the filler, in their order, at uniform random places.

    Returns the context int32 [C] with C = prefix + filler + sum(frame + record), bool [C] that is True on
    the filler, and the start of each record (behind its frame) as a share of C.
    """
    cuts = np.sort(rng.integers(0, len(filler) + 1, len(records)))
    texts = np.split(filler, cuts)
    parts = [vocabulary.prefix]
    for text, record in zip(texts, records, strict=False):
        parts += [text, vocabulary.frame, record]
    parts.append(texts[-1])
    is_filler = np.repeat(np.arange(len(parts)) % 3 == 1, [len(part) for part in parts])
    ends = np.cumsum([len(part) for part in parts])[3::3]
    starts = ends - [len(record) for record in records]
    context = np.concatenate(parts).astype(np.int32)
    return context, is_filler, starts / len(context)


def draw_filler(rng: np.random.Generator, text: np.ndarray, length: int, without: np.ndarray) -> np.ndarray:
    """A random window of `text`, int32 [length], after the tokens in `without` are left out.

    Leaving out the single-token keys of a scene is what makes every question have one answer.
    """
    if length <= 0:
        return np.zeros(0, np.int32)
    if len(text) < 2 * length:
        text = np.tile(text, 2 * length // max(len(text), 1) + 1)
    size = length
    while True:
        size = min(2 * size, len(text))
        start = int(rng.integers(0, len(text) - size + 1))
        window = text[start : start + size]
        window = window[~np.isin(window, without)]
        if len(window) >= length:
            return window[:length].astype(np.int32)
        if size == len(text):
            raise UsageError(
                f"the filler text has {len(text)} tokens, of which {len(window)} may be used, and the context "
                f"needs {length}: give a longer text"
            )
