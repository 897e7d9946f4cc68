"""Recorders: layer caches that keep what attention handed over, so that many methods can be fed the same.

One exact pass over a prompt serves every method that compresses at the prompt's end (`PromptRecorder`, then
`LayerCache.absorb_prompt`), and one decode with a reference cache serves every method whose attention output is to be
compared with it (`StepRecorder`, then `LayerCache.step` on what was recorded).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax

from kvjax.cache.head_split import AnyLayer
from kvjax.cache.prompt import attend_prompt
from kvjax.cache.step import Step
from kvjax.typing import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RecordedPrompt:
    """A layer's whole prompt with the log-sum-exp of its exact attention, f32 [B, K, G, T]."""

    step: Step
    log_sum_exp: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PromptRecorder:
    """Takes the first step of an empty cache (`length` int32 [B] of zeros) and keeps it, uncompressed."""

    length: Array

    def step(self, step: Step) -> tuple[Array, RecordedPrompt]:
        """Exact causal attention [B, T, N, H] of the prompt to itself, and the prompt."""
        output, store = self.read(step)
        return output, store(output)

    def read(self, step: Step) -> tuple[Array, Callable[[Array], RecordedPrompt]]:
        """As `LayerCache.read`."""
        output, log_sum_exp = attend_prompt(step)
        return output, lambda after: RecordedPrompt(step, log_sum_exp)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RecordedStep:
    """A step and the attention output [B, T, N, H] that a cache gave for it."""

    step: Step
    output: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepRecorder:
    """Passes each step on to `inner`, follows its output, and keeps the last one in `seen`."""

    inner: AnyLayer
    seen: RecordedStep | None = None

    @property
    def length(self) -> Array:
        """int32 [B]."""
        return self.inner.length

    def step(self, step: Step) -> tuple[Array, StepRecorder]:
        """As `LayerCache.step`."""
        output, store = self.read(step)
        return output, store(output)

    def read(self, step: Step) -> tuple[Array, Callable[[Array], StepRecorder]]:
        """As `LayerCache.read`."""
        output, store = self.inner.read(step)
        return output, lambda after: StepRecorder(store(after), RecordedStep(step, output))
