"""What a model is asked: prompts and what follows them, from the recall tasks and from the held-out text.

A recall task asks one question about a context (`kvjax.tasks`). `perplexity` has two protocols that must not be mixed
in one number: in `perplexity-prefill` the prompt attends to itself exactly, is compressed, and its continuation is
read through the cache (KIVI's protocol); in `perplexity-stream` every token of the text is read through the compressed
cache, one after another (KVQuant's).
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kvjax.assets import heldout_text
from kvjax.errors import UsageError, unknown
from kvjax.evaluation.setting import Setting
from kvjax.models.language_model import LanguageModel
from kvjax.tasks import TASKS, Example, Vocabulary, examples

Tokens = NDArray[np.int32]


@dataclasses.dataclass(frozen=True)
class Item:
    """One row.

    Attributes:
      prompt: int32 [P], what the cache holds before anything is asked; empty where the text is streamed.
      follow: int32 [F], fed token by token; its last `graded` tokens are what the model must predict.
      unread: how many tokens of `follow` are the prompt's last ones, which methods see but caches do not hold, so that
        even the first graded token is predicted by reading the cache.
      graded: 1 to F (F - 1 where the prompt is empty).
      example: what the row's answer is scored by; None for text.
      text_bytes: bytes of the graded tokens' text, for bits per byte; 0 for generated words.
    """

    prompt: Tokens
    follow: Tokens
    graded: int
    example: Example | None = None
    text_bytes: int = 0
    unread: int = 0


class Source:
    """What the workloads take from a model: its words, and the held-out text in its tokens."""

    def __init__(self, model: LanguageModel) -> None:
        backend = model.tokenizer.backend
        if backend is None:
            raise UsageError(f"model {model.name!r} has no tokenizer; put its tokenizer.json into the folder")
        self.backend = backend
        self.vocabulary = Vocabulary.of(backend)

    @cached_property
    def _encoded(self) -> tuple[Tokens, NDArray[np.int64]]:
        text = heldout_text()
        encoding = self.backend.encode(text, add_special_tokens=False)
        byte_of_char = np.cumsum([0] + [len(c.encode()) for c in text]) if not text.isascii() else None
        starts = np.array([start for start, _ in encoding.offsets] + [len(text)], np.int64)
        return np.asarray(encoding.ids, np.int32), starts if byte_of_char is None else byte_of_char[starts]

    @property
    def text(self) -> Tokens:
        """int32 [n], the held-out text."""
        return self._encoded[0]

    @property
    def byte_starts(self) -> NDArray[np.int64]:
        """int64 [n + 1], the byte at which each token of the text begins, and the text's length."""
        return self._encoded[1]


class Workload(Protocol):
    """A family of items; frozen."""

    @property
    def scored(self) -> bool:
        """Whether rows have an answer that is right or wrong; otherwise they are text and have a perplexity."""
        ...

    @property
    def streamed(self) -> bool:
        """Whether there is no prompt and the whole text runs through the cache."""
        ...

    def items(self, source: Source, setting: Setting, count: int, seed: int) -> list[Item]:
        """`count` rows; row i depends on (seed, i) and the setting alone. Raises UsageError where they do not fit."""
        ...


@dataclasses.dataclass(frozen=True)
class Recall:
    """A task of `kvjax.tasks`, by name."""

    task: str
    scored: bool = True
    streamed: bool = False

    def items(self, source: Source, setting: Setting, count: int, seed: int) -> list[Item]:
        turn = TASKS[self.task].turn_size(source.vocabulary)
        if turn > setting.room:
            raise UsageError(f"task {self.task!r} asks and answers in {turn} tokens, more than the {setting.room} here")
        made = []
        # The context (query-aware: and the question) has exactly `prompt` tokens, so that no row needs padding.
        probe = next(examples(self.task, source.vocabulary, source.text, length=setting.context, count=1, seed=0))
        length = setting.prompt + (len(probe.answer) if setting.query_aware else turn)
        for e in examples(self.task, source.vocabulary, source.text, length=length, count=count, seed=seed):
            parts = [e.context, e.question] if setting.query_aware else [e.context]
            unread = 1 if setting.query_aware else 0
            follow = np.concatenate([e.question[-1:] if setting.query_aware else e.question, e.answer])
            made.append(Item(np.concatenate(parts), follow.astype(np.int32), len(e.answer), e, unread=unread))
        return made


@dataclasses.dataclass(frozen=True)
class Text:
    """Windows of `context` tokens of the held-out text; the windows of both protocols are the same."""

    streamed: bool
    scored: bool = False

    def items(self, source: Source, setting: Setting, count: int, seed: int) -> list[Item]:
        prefix = source.vocabulary.prefix
        size = setting.context - len(prefix)
        if len(source.text) < size:
            raise UsageError(
                f"the held-out text has {len(source.text)} tokens here, fewer than a context of {setting.context}"
            )
        made = []
        for index in range(count):
            rng = np.random.default_rng([zlib.crc32(b"perplexity"), seed, index])
            start = int(rng.integers(0, len(source.text) - size + 1))
            window = np.concatenate([prefix, source.text[start : start + size]]).astype(np.int32)
            cut = 0 if self.streamed else setting.prompt
            graded = min(setting.context - max(cut, 1), size)
            ends = source.byte_starts[[start + size - graded, start + size]]
            made.append(Item(window[:cut], window[cut:], graded, text_bytes=int(ends[1] - ends[0])))
        return made


WORKLOADS: Mapping[str, Workload] = MappingProxyType(
    {name: Recall(name) for name in TASKS}
    | {"perplexity-prefill": Text(streamed=False), "perplexity-stream": Text(streamed=True)}
)

#: One name for several workloads.
GROUPS: Mapping[str, tuple[str, ...]] = MappingProxyType({"perplexity": ("perplexity-prefill", "perplexity-stream")})


def expand(tasks: Sequence[str]) -> list[str]:
    """The workloads that are named, in order and without repeats.

    Raises:
      UsageError: an unknown name; says which are nearest.
    """
    named: list[str] = []
    for task in tasks:
        if task not in WORKLOADS and task not in GROUPS:
            raise unknown("task", task, [*WORKLOADS, *GROUPS])
        named += GROUPS.get(task, (task,))
    return list(dict.fromkeys(named))


def room(vocabulary: Vocabulary) -> int:
    """Tokens that follow a prompt: what the longest question and answer of any task needs, in multiples of 32."""
    longest = max(task.turn_size(vocabulary) for task in TASKS.values())
    return -(-longest // 32) * 32
