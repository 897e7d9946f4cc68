"""Training batches: a pure function of (seed, step, stage), so that a resumed run sees the same data."""

from __future__ import annotations

import dataclasses
import queue
import threading
from collections.abc import Generator
from typing import Any, Protocol

import numpy as np

from kvjax.tasks import Chains, Copy, ManyValues, Retrieval, Scene, Task, Turn, Vocabulary
from kvjax.training.schedule import TASKS, Stage

#: What a sequence can be; `Batch.family` indexes it.
FAMILIES = ("text", "repeat", "kv", *TASKS)
TEXT, REPEAT, KV = 0, 1, 2
MOST_TURNS = 16


@dataclasses.dataclass(frozen=True)
class Batch:
    """Token sequences one longer than the model sees: inputs are [:, :-1], targets [:, 1:].

    Attributes:
      tokens: int32 [B, T + 1].
      answer: bool [B, T + 1], True on tokens that follow from what stands before them.
      text: bool [B, T + 1], True on ordinary text. On neither (records, questions) there is no loss.
      family: int32 [B], index into FAMILIES.
    """

    tokens: np.ndarray
    answer: np.ndarray
    text: np.ndarray
    family: np.ndarray


class Source(Protocol):
    """What training reads: the same batch whenever it is asked for the same step."""

    def batch(self, step: int, stage: Stage) -> Batch:
        """The batch of this step at this stage."""
        ...


@dataclasses.dataclass(frozen=True)
class Batches:
    """All batches of a training run.

    Attributes:
      vocabulary: words and markers of the tokenizer.
      corpus: uint16 or int32 [n], the encoded training text.
      seed: of the run.
      batch_tokens: tokens per batch, whatever the length of its sequences.
    """

    vocabulary: Vocabulary
    corpus: np.ndarray
    seed: int
    batch_tokens: int

    def batch(self, step: int, stage: Stage) -> Batch:
        """The batch of this step at this stage."""
        rng = np.random.default_rng([self.seed, step])
        length = stage.length // int(rng.choice([2, 4, 8])) if rng.random() < stage.shorter else stage.length
        stage = dataclasses.replace(stage, length=length)
        rows = [self._row(rng, stage, length + 1) for _ in range(max(1, self.batch_tokens // length))]
        tokens, answer, text, family = (np.stack(column) for column in zip(*rows, strict=True))
        return Batch(tokens.astype(np.int32), answer, text, family.astype(np.int32))

    def _row(self, rng: np.random.Generator, stage: Stage, size: int) -> tuple[np.ndarray, ...]:
        kind = rng.random()
        if kind < stage.repeat:
            return (self._periodic if rng.random() < 0.5 else self._segments)(rng, size)
        if kind < stage.repeat + stage.text:
            return self._text(rng, size)
        family, task = draw_task(rng, stage)
        while task.fixed(self.vocabulary) > size:
            family, task = draw_task(rng, stage)
        filled = rng.random() < stage.filler
        tokens, answer, text = pack(rng, self.vocabulary, self.corpus, task, size, filled)
        return tokens, answer, text, np.asarray(family)

    def _text(self, rng: np.random.Generator, size: int) -> tuple[np.ndarray, ...]:
        prefix = self.vocabulary.prefix
        start = int(rng.integers(0, len(self.corpus) - size))
        tokens = np.concatenate([prefix, self.corpus[start : start + size - len(prefix)]])
        return tokens, np.zeros(size, bool), np.arange(size) >= len(prefix), np.asarray(TEXT)

    def _periodic(self, rng: np.random.Generator, size: int) -> tuple[np.ndarray, ...]:
        """Random tokens with a period between 3 and a third of the length; answers from the second period on."""
        prefix = self.vocabulary.prefix
        period = int(rng.integers(3, max(4, size // 3 + 1)))
        cycle = rng.integers(0, self.vocabulary.size, period)
        tokens = np.concatenate([prefix, np.resize(cycle, size - len(prefix))])
        return tokens, np.arange(size) >= len(prefix) + period, np.zeros(size, bool), np.asarray(REPEAT)

    def _segments(self, rng: np.random.Generator, size: int) -> tuple[np.ndarray, ...]:
        """Segments of 2 to 6 random tokens, visited again and again in random order.

        The answers are what follows a segment's first token from the second visit on. Because the distance to
        the last visit varies, only content finds them; one fixed period alone would teach fixed distances.
        """
        prefix = self.vocabulary.prefix
        sizes = rng.integers(2, 7, max(2, int(rng.integers(2, size // 8 + 1))))
        tokens = rng.choice(self.vocabulary.size, sizes.sum(), replace=sizes.sum() > self.vocabulary.size)
        segments = np.split(tokens, np.cumsum(sizes)[:-1])
        visits = rng.integers(0, len(segments), size)
        again = np.asarray([visit in visits[:i] for i, visit in enumerate(visits)])
        answer = np.concatenate([np.arange(int(sizes[v])) * again[i] > 0 for i, v in enumerate(visits)])
        room = size - len(prefix)
        tokens = np.concatenate([prefix, np.concatenate([segments[v] for v in visits])[:room]])
        return tokens, np.pad(answer[:room], (len(prefix), 0)), np.zeros(size, bool), np.asarray(REPEAT)


def draw_task(rng: np.random.Generator, stage: Stage) -> tuple[int, Task]:
    """A family and a task of it, no harder than the stage allows."""
    pairs = int(rng.integers(1, stage.pairs + 1))
    if rng.random() >= stage.tasks:
        return KV, Retrieval(pairs=pairs)
    name = TASKS[int(rng.choice(len(TASKS), p=np.asarray(stage.shares)))]
    few = min(stage.pairs, 16)
    small = stage.length < 128
    if name == "kv3":
        widths = rng.integers(1, 3 if small else 4, 2)
        task: Task = Retrieval(pairs, int(widths[0]), int(widths[1]))
    elif name == "multikey":
        task = Retrieval(4, 2, int(rng.integers(1, 3)), crossed=True)
    elif name == "multiquery":
        task = Retrieval(int(rng.integers(4, max(few, 4) + 1)), asked=4)
    elif name == "multivalue":
        task = ManyValues(int(rng.integers(1, 3)), int(rng.integers(2, 5)))
    elif name == "vt":
        task = Chains(int(rng.integers(1, 3 if small else 5)), int(rng.integers(1, 5)))
    else:
        task = Copy(16, 2, 8) if small else Copy()
    return FAMILIES.index(name), task


def pack(
    rng: np.random.Generator, vocabulary: Vocabulary, corpus: np.ndarray, task: Task, size: int, filled: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A scene and several of its turns as one sequence: tokens, answer mask and text mask, each [size].

    `size` must hold the task's records and one turn. `filled`: no question comes twice, and filler takes the
    room that is left; otherwise the records stand alone and turns fill up.
    """
    room = size - task.fixed(vocabulary)
    most = 1 + room // task.turn_size(vocabulary)
    turns = min(most, int(rng.integers(1, MOST_TURNS + 1)), task.questions) if filled else most
    filler = room - (turns - 1) * task.turn_size(vocabulary) if filled else 0
    scene = task.scene(rng, vocabulary, corpus, filler, turns)
    tokens, answer, text = join(scene, rng)
    missing = size - len(tokens)
    return tuple(np.pad(row, (0, missing)) for row in (tokens, answer, text))  # pyright: ignore[reportReturnType]


def join(scene: Scene, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The scene's context and all turns in a row: tokens, True on answers, True on filler.

    Where the parts of an answer may come in any order they come in a random one, so that what is learnt is to name
    those that are not named yet, not to count occurrences.
    """
    parts = [scene.context, *(part for turn in scene.turns for part in (turn.question, _any_order(turn, rng)))]
    sizes = [len(part) for part in parts]
    answer = np.repeat([False, *([False, True] * len(scene.turns))], sizes)
    text = np.pad(scene.filler, (0, sum(sizes[1:])))
    return np.concatenate(parts), answer, text


def _any_order(turn: Turn, rng: np.random.Generator) -> np.ndarray:
    return turn.answer if turn.ordered else rng.permutation(turn.answer.reshape(len(turn.items), -1)).reshape(-1)


def reader(batches: Source, start: int, stage: Stage, ahead: int = 2) -> Generator[Batch, None, None]:
    """The batches from step `start` on at one stage, made `ahead` of time in a thread.

    Through grain where it is installed; the order is the same without it. Close it when the stage ends.
    """
    try:
        import grain
    except ImportError:
        return _threaded(batches, start, stage, ahead)
    return _grained(grain, batches, start, stage, ahead)


@dataclasses.dataclass(frozen=True)
class _Steps:
    """Batches as the random-access source that grain reads."""

    batches: Source
    start: int
    stage: Stage

    def __len__(self) -> int:
        return 1 << 30

    def __getitem__(self, index: int) -> Batch:
        return self.batches.batch(self.start + index, self.stage)


def _grained(grain: Any, batches: Source, start: int, stage: Stage, ahead: int) -> Generator[Batch, None, None]:
    from absl import flags

    flags.FLAGS.mark_as_parsed()  # grain reads flags; outside an absl app nobody else parses them
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=ahead)
    iterator = iter(grain.MapDataset.source(_Steps(batches, start, stage)).to_iter_dataset(options))
    try:
        yield from iterator
    finally:
        iterator.close()


def _threaded(batches: Source, start: int, stage: Stage, ahead: int) -> Generator[Batch, None, None]:
    ready: queue.Queue[Batch] = queue.Queue(ahead)
    stop = threading.Event()

    def work() -> None:
        step = start
        while not stop.is_set():
            batch = batches.batch(step, stage)
            step += 1
            while not stop.is_set():
                try:
                    ready.put(batch, timeout=0.1)
                    break
                except queue.Full:
                    continue

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            yield ready.get()
    finally:
        stop.set()
        thread.join()
