"""What a study is: conditions under which methods are measured, and claims that were written down beforehand."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

from kvjax.cache.method import CacheMethod
from kvjax.calibration.finder import Finder
from kvjax.evaluation import defaults
from kvjax.models.language_model import LanguageModel

Measure = Literal["perplexity", "score", "divergence"]
Direction = Literal["higher", "lower"]


def as_it_is(model: LanguageModel) -> LanguageModel:
    """The model itself."""
    return model


@dataclasses.dataclass(frozen=True)
class Entry:
    """One method of a condition.

    Attributes:
      label: what tables call it. Usually also how it is named: `method` is the label unless given.
      size: the share of a full bf16 cache's bytes that it is to take, where a budget or a window decides that; None
        where it takes what it takes.
      finders: how it is calibrated, where the defaults of `kvjax.calibrate` do not do.
    """

    label: str
    method: str | CacheMethod = ""
    size: float | None = None
    finders: tuple[Finder, ...] = ()

    @property
    def named(self) -> str | CacheMethod:
        """As `kvjax.compare` takes it, without its size."""
        return self.method or self.label


@dataclasses.dataclass(frozen=True)
class Condition:
    """Methods that are measured on the same model, tasks and examples; they share one exact prefill.

    Attributes:
      name: unique in a study.
      entries: the methods; the full cache is always measured besides.
      tasks: names as `kvjax compare` takes them.
      context: tokens of a row. query_aware: whether the question is seen while the cache is compressed.
      chunk: tokens per step of methods that read a prompt in pieces.
      model: makes of the model the one that is measured.
      why: for a planted condition, what the model itself lacks.
    """

    name: str
    entries: tuple[Entry, ...]
    tasks: tuple[str, ...]
    context: int = 512
    query_aware: bool = True
    chunk: int = defaults.CHUNK
    model: Callable[[LanguageModel], LanguageModel] = as_it_is
    why: str = ""


@dataclasses.dataclass(frozen=True)
class Claim:
    """A difference between two methods, its sign predicted before it was measured.

    Attributes:
      says: the claim in words. paper: what the paper reports, in numbers.
      condition: where it is measured. measure: by what.
      method, against: labels of the two; the difference is the first minus the second.
      predicted: the sign of the difference.
      margin: how far it may lie on the other side of 0: "no more than this worse". In nats for perplexity (the
        difference of its logarithm) and divergence, and a share of questions for scores.
      tasks: that are counted; () is all that have this measure.
    """

    says: str
    paper: str
    condition: str
    measure: Measure
    method: str
    against: str
    predicted: Direction
    margin: float = 0.0
    tasks: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Study:
    """One paper's headline on the reference model; the module's docstring discusses what came out.

    Attributes:
      title: the paper. conditions, claims: in the order of the page.
    """

    title: str
    conditions: tuple[Condition, ...]
    claims: tuple[Claim, ...]

    def __post_init__(self) -> None:
        known = {condition.name: {"full", *(e.label for e in condition.entries)} for condition in self.conditions}
        for claim in self.claims:
            assert {claim.method, claim.against} <= known[claim.condition], claim


def sized(name: str, *sizes: float, method: CacheMethod | str = "") -> tuple[Entry, ...]:
    """One method at several sizes: labels "h2o at 20 %"."""
    return tuple(Entry(at(name, size), method or name, size) for size in sizes)


def at(name: str, size: float) -> str:
    """The label of a method at a size."""
    return f"{name} at {100 * size:.3g} %"
