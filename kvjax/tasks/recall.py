"""Recall tasks as data: what is written into the context and what is asked of it.

A record is `key value`, the value right behind the key, with a line break in front; records stand at
uniform random places of a filler text in which no single-token key of the scene occurs. Every question is
`ask key`, answered by the value. One that wants several records is `ask key … ask`, answered by `key value …`:
the answer repeats each key before its value. Every answer follows from the context alone. The task names are
those of RULER (Hsieh et al., 2024, arXiv 2404.06654) where it has the same task.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import numpy as np

from kvjax.errors import UsageError
from kvjax.tasks.scene import Scene, Turn, draw_filler, occurrences, weave
from kvjax.tasks.words import Vocabulary


class Task(Protocol):
    """A family of scenes; frozen, so that it can be a key and part of a config."""

    @property
    def questions(self) -> int:
        """How many different questions a scene has."""
        ...

    def fixed(self, vocabulary: Vocabulary) -> int:
        """Tokens of a scene with one turn and no filler."""
        ...

    def turn_size(self, vocabulary: Vocabulary) -> int:
        """Tokens of one question and its answer."""
        ...

    def scene(
        self, rng: np.random.Generator, vocabulary: Vocabulary, text: np.ndarray, filler: int, turns: int = 1
    ) -> Scene:
        """A scene with `filler` tokens taken from `text` int32 [n]; the same generator state gives the same scene."""
        ...


@dataclasses.dataclass(frozen=True)
class Retrieval:
    """`pairs` records `key value`; each turn asks for `asked` different keys at once.

    Attributes:
      pairs: records in the context.
      key_tokens, value_tokens: words per key and per value. Words of longer keys repeat freely among
        keys; only whole keys differ.
      asked: keys per question; the answer goes through them in the order asked.
      crossed: two-token keys that are all combinations of a few first and a few second words, so that
        each half of a key is also half of a distractor.
    """

    pairs: int = 1
    key_tokens: int = 1
    value_tokens: int = 1
    asked: int = 1
    crossed: bool = False

    @property
    def questions(self) -> int:
        return self.pairs // self.asked

    def turn_size(self, vocabulary: Vocabulary) -> int:
        if self.asked == 1:
            return len(vocabulary.ask) + self.key_tokens + self.value_tokens
        return 2 * len(vocabulary.ask) + self.asked * (2 * self.key_tokens + self.value_tokens)

    def fixed(self, vocabulary: Vocabulary) -> int:
        record = len(vocabulary.frame) + self.key_tokens + self.value_tokens
        return len(vocabulary.prefix) + self.pairs * record + self.turn_size(vocabulary)

    def _keys(self, rng: np.random.Generator, words: np.ndarray) -> np.ndarray:
        if not self.crossed:
            return draw_rows(rng, words, self.pairs, self.key_tokens)
        side = int(np.ceil(np.sqrt(self.pairs)))
        first, second = np.split(rng.choice(words, 2 * side, replace=False), 2)
        grid = np.stack(np.meshgrid(first, second, indexing="ij"), -1).reshape(-1, 2)
        return rng.permutation(grid)[: self.pairs]

    def scene(
        self, rng: np.random.Generator, vocabulary: Vocabulary, text: np.ndarray, filler: int, turns: int = 1
    ) -> Scene:
        while True:
            keys = self._keys(rng, vocabulary.keys)
            values = draw_rows(rng, vocabulary.values, self.pairs, self.value_tokens)
            records = list(np.concatenate([keys, values], axis=1))
            without = keys[:, 0] if keys.shape[1] == 1 else keys[:0, 0]
            context, is_filler, starts = weave(rng, vocabulary, records, draw_filler(rng, text, filler, without))
            if all(len(occurrences(context, key)) == 1 for key in keys):
                break
        picks = draw_turns(rng, self.pairs, self.asked, turns)
        return Scene(context, is_filler, tuple(self._turn(vocabulary, keys, values, starts, pick) for pick in picks))

    def _turn(
        self, vocabulary: Vocabulary, keys: np.ndarray, values: np.ndarray, starts: np.ndarray, pick: np.ndarray
    ) -> Turn:
        question = np.concatenate([vocabulary.ask, keys[pick].reshape(-1)])
        depth = float(starts[pick[0]])
        if self.asked == 1:
            return Turn(question, values[pick[0]], (self.value_tokens,), depth)
        answer = np.concatenate([keys[pick], values[pick]], axis=1)
        return Turn(np.append(question, vocabulary.ask), answer.reshape(-1), (answer.shape[1],) * self.asked, depth)


@dataclasses.dataclass(frozen=True)
class ManyValues:
    """`keys` keys with `values` values each, one per record; the answer lists all of one key's, in any order."""

    keys: int = 2
    values: int = 4

    @property
    def questions(self) -> int:
        return self.keys

    def turn_size(self, vocabulary: Vocabulary) -> int:
        return 2 * len(vocabulary.ask) + 1 + 2 * self.values

    def fixed(self, vocabulary: Vocabulary) -> int:
        records = self.keys * self.values * (len(vocabulary.frame) + 2)
        return len(vocabulary.prefix) + records + self.turn_size(vocabulary)

    def scene(
        self, rng: np.random.Generator, vocabulary: Vocabulary, text: np.ndarray, filler: int, turns: int = 1
    ) -> Scene:
        keys = draw_rows(rng, vocabulary.keys, self.keys, 1)[:, 0]
        values = draw_rows(rng, vocabulary.values, self.keys * self.values, 1)[:, 0]
        owner = rng.permutation(np.repeat(np.arange(self.keys), self.values))
        records = list(np.stack([keys[owner], values], axis=1))
        context, is_filler, starts = weave(rng, vocabulary, records, draw_filler(rng, text, filler, keys))

        def turn(key: int) -> Turn:
            mine = np.flatnonzero(owner == key)
            question = np.concatenate([vocabulary.ask, keys[key : key + 1], vocabulary.ask])
            answer = np.stack([np.repeat(keys[key], self.values), values[mine]], axis=1).reshape(-1)
            return Turn(question, answer, (2,) * self.values, float(starts[mine[0]]), ordered=False)

        return Scene(context, is_filler, tuple(turn(int(pick[0])) for pick in draw_turns(rng, self.keys, 1, turns)))


@dataclasses.dataclass(frozen=True)
class Chains:
    """Variable tracking: `chains` interleaved chains of records `v a`, `a b`, `b c`, … in chain order.

    The question gives a chain's first name; each of the `hops` answer tokens is one lookup further.
    """

    chains: int = 3
    hops: int = 4

    @property
    def questions(self) -> int:
        return self.chains

    def turn_size(self, vocabulary: Vocabulary) -> int:
        return len(vocabulary.ask) + 1 + self.hops

    def fixed(self, vocabulary: Vocabulary) -> int:
        records = self.chains * self.hops * (len(vocabulary.frame) + 2)
        return len(vocabulary.prefix) + records + self.turn_size(vocabulary)

    def scene(
        self, rng: np.random.Generator, vocabulary: Vocabulary, text: np.ndarray, filler: int, turns: int = 1
    ) -> Scene:
        words = np.concatenate([vocabulary.keys, vocabulary.values])
        names = draw_rows(rng, words, self.chains * (self.hops + 1), 1).reshape(self.chains, self.hops + 1)
        owner = rng.permutation(np.repeat(np.arange(self.chains), self.hops))
        hop = np.asarray([np.sum(owner[:i] == chain) for i, chain in enumerate(owner)], np.int64)
        records = [names[chain, h : h + 2] for chain, h in zip(owner, hop, strict=True)]
        context, is_filler, starts = weave(rng, vocabulary, records, draw_filler(rng, text, filler, names.reshape(-1)))

        def turn(chain: int) -> Turn:
            question = np.append(vocabulary.ask, names[chain, 0])
            return Turn(question, names[chain, 1:], (1,) * self.hops, float(starts[owner == chain][0]))

        return Scene(context, is_filler, tuple(turn(int(pick[0])) for pick in draw_turns(rng, self.chains, 1, turns)))


@dataclasses.dataclass(frozen=True)
class Copy:
    """One span of different random words; `cue` of them are given and the next `answer` must follow."""

    span: int = 24
    cue: int = 4
    answer: int = 16

    @property
    def questions(self) -> int:
        return 1

    def turn_size(self, vocabulary: Vocabulary) -> int:
        return len(vocabulary.ask) + self.cue + self.answer

    def fixed(self, vocabulary: Vocabulary) -> int:
        return len(vocabulary.prefix) + len(vocabulary.frame) + self.span + self.turn_size(vocabulary)

    def scene(
        self, rng: np.random.Generator, vocabulary: Vocabulary, text: np.ndarray, filler: int, turns: int = 1
    ) -> Scene:
        words = np.concatenate([vocabulary.keys, vocabulary.values])
        while True:
            span = draw_rows(rng, words, self.span, 1)[:, 0]
            context, is_filler, starts = weave(rng, vocabulary, [span], draw_filler(rng, text, filler, span[:0]))
            offsets = rng.integers(0, self.span - self.cue - self.answer + 1, turns)
            if all(len(occurrences(context, span[o : o + self.cue])) == 1 for o in offsets):
                break

        def turn(offset: int) -> Turn:
            cue, rest = np.split(span[offset : offset + self.cue + self.answer], [self.cue])
            return Turn(np.concatenate([vocabulary.ask, cue]), rest, (1,) * self.answer, float(starts[0]))

        return Scene(context, is_filler, tuple(turn(int(offset)) for offset in offsets))


def draw_rows(rng: np.random.Generator, words: np.ndarray, count: int, width: int) -> np.ndarray:
    """`count` different rows of `width` words, int32 [count, width]; the words of longer rows may repeat.

    Raises UsageError when there are not that many.
    """
    if float(len(words)) ** width < 2 * count and (width > 1 or len(words) < count):
        raise UsageError(
            f"{count} different keys or values of {width} words need more than the {len(words)} words here"
        )
    if width == 1:
        return rng.choice(words, (count, 1), replace=False)
    while True:
        rows = rng.choice(words, (count, width))
        if len(np.unique(rows, axis=0)) == count:
            return rows


def draw_turns(rng: np.random.Generator, records: int, asked: int, turns: int) -> np.ndarray:
    """For each turn the different records that it asks for, int [turns, asked].

    No record is asked for again before all others had their turn (where `asked` divides `records`).
    """
    per_round = records // asked
    rounds = [rng.permutation(records)[: per_round * asked] for _ in range(-(-turns // per_round))]
    return np.concatenate(rounds).reshape(-1, asked)[:turns]
