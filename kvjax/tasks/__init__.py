"""Recall tasks, generated offline from a seed. NumPy only: used for training data and for evaluation.

vocabulary = Vocabulary.of(tokenizer)
for example in examples("kv", vocabulary, text, length=1024, count=200, seed=0): ...
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from types import MappingProxyType

import numpy as np

from kvjax.errors import UsageError, unknown
from kvjax.tasks.recall import Chains, Copy, ManyValues, Retrieval, Task
from kvjax.tasks.scene import Example, Scene, Turn, occurrences, recall, score
from kvjax.tasks.words import Vocabulary

__all__ = [
    "TASKS",
    "Chains",
    "Copy",
    "Example",
    "ManyValues",
    "Retrieval",
    "Scene",
    "Task",
    "Turn",
    "Vocabulary",
    "examples",
    "occurrences",
    "recall",
    "score",
    "task_named",
]

TASKS: Mapping[str, Task] = MappingProxyType(
    {
        "needle": Retrieval(),
        "multikey": Retrieval(pairs=4, key_tokens=2, crossed=True),
        "multivalue": ManyValues(),
        "multiquery": Retrieval(pairs=16, asked=4),
        "kv": Retrieval(pairs=16),
        "kv3": Retrieval(pairs=16, key_tokens=3, value_tokens=3),
        "vt": Chains(),
        "copy": Copy(),
    }
)


def task_named(name: str) -> Task:
    """The task registered as `name`; raises UsageError with the nearest names."""
    if name not in TASKS:
        raise unknown("task", name, TASKS)
    return TASKS[name]


def examples(
    task: str | Task, vocabulary: Vocabulary, text: np.ndarray, *, length: int, count: int, seed: int
) -> Iterator[Example]:
    """`count` examples in which context, question and answer have `length` tokens together.

    Example i depends on (task, seed, i) alone. `text` int [n] is the filler: ordinary text, encoded.
    Raises UsageError when `length` cannot hold the task's records.
    """
    name = task if isinstance(task, str) else repr(task)
    task = task_named(task) if isinstance(task, str) else task
    filler = length - task.fixed(vocabulary)
    if filler < 0:
        raise UsageError(f"task {name} needs at least {length - filler} tokens and the length is {length}")
    for index in range(count):
        rng = np.random.default_rng([zlib.crc32(name.encode()), seed, index])
        scene = task.scene(rng, vocabulary, text, filler)
        turn = scene.turns[0]
        yield Example(name, scene.context, turn.question, turn.answer, turn.items, turn.depth, turn.ordered)
