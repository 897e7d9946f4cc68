"""What a finder is: one idea of how to learn from a model what a part of a method must know."""

from __future__ import annotations

import dataclasses
from typing import Protocol

from kvjax.cache.layer_cache import LayerData
from kvjax.cache.layout import CacheDims
from kvjax.cache.method import CacheMethod
from kvjax.calibration.samples import Samples
from kvjax.models.language_model import LanguageModel
from kvjax.progress import Track


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """What a finder works with.

    Attributes:
      model: whose. method: what for, with what earlier finders have found.
      samples: sequences to run; None where there is no text.
      batch: sequences at a time. seed: of random draws. track: shows progress.
    """

    model: LanguageModel
    method: CacheMethod
    samples: Samples | None
    batch: int
    seed: int
    track: Track

    @property
    def given(self) -> Samples:
        """The samples of a finder that `reads`."""
        assert self.samples is not None
        return self.samples

    @property
    def steps(self) -> int:
        """Batches of the samples."""
        return -(-len(self.given) // self.batch)


@dataclasses.dataclass(frozen=True, eq=False)
class Found:
    """What a finder adds.

    Attributes:
      method: with its tables and shares, if that is what was found.
      layers: per layer, the arrays of some of its parts; empty where there are none.
      notes: what was found, in words.
    """

    method: CacheMethod
    layers: tuple[LayerData, ...] = ()
    notes: tuple[str, ...] = ()


class Finder(Protocol):
    """A frozen dataclass; its fields are the choices that the idea leaves open."""

    @property
    def reads(self) -> bool:
        """Whether it needs sample texts."""
        ...

    def fits(self, method: CacheMethod, dims: tuple[CacheDims, ...]) -> bool:
        """Whether the method has a part that this finds something for."""
        ...

    def find(self, task: Task) -> Found:
        """Runs the model."""
        ...
