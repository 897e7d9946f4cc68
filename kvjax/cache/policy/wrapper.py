"""A policy that changes the scores of another one."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from kvjax.cache.layout import CacheDims
from kvjax.cache.policy.base import GroupReduce, Perturbed, Policy, Repetition
from kvjax.cache.policy.seen import Prompt, Tokens
from kvjax.typing import Array, PyTree


@dataclasses.dataclass(frozen=True)
class Wrapper(Policy):
    """Everything is the inner policy's, statistics, state and data included; subclasses change scores.

    Attributes:
      inner: whose scores are changed.
    """

    inner: Policy

    @property
    def per_head(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.inner.per_head

    @property
    def scope(self) -> Literal["head", "layer"]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.inner.scope

    @property
    def online(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.inner.online

    @property
    def streams(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.inner.streams

    @property
    def arrives_scored(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.inner.arrives_scored

    @property
    def forgets(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.inner.forgets

    @property
    def perturbs(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.inner.perturbs

    @property
    def calibrated(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.inner.calibrated

    @property
    def needs_hiding(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.inner.needs_hiding

    @property
    def repetition(self) -> Repetition | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.inner.repetition

    @property
    def mass_reduce(self) -> GroupReduce | None:
        return self.inner.mass_reduce

    @property
    def least_recent(self) -> int:
        return self.inner.least_recent

    def prompt_statistics(self, prompt: Prompt) -> Array:
        return self.inner.prompt_statistics(prompt)

    def arrival(self, tokens: Tokens) -> Array:
        return self.inner.arrival(tokens)

    def initial_state(self, dims: CacheDims) -> PyTree:
        return self.inner.initial_state(dims)

    def next_state(self, state: PyTree, tokens: Tokens) -> PyTree:
        return self.inner.next_state(state, tokens)

    def perturbed(self, tokens: Tokens) -> Perturbed | None:
        return self.inner.perturbed(tokens)

    def parameter_shapes(self, dims: CacheDims) -> PyTree:
        return self.inner.parameter_shapes(dims)


class AtPromptEnd(Wrapper):
    """The inner policy chooses at the end of the prompt alone; what goes later is a matter of positions."""

    online: ClassVar[bool] = True  # pyright: ignore[reportIncompatibleVariableOverride, reportIncompatibleMethodOverride]
    streams: ClassVar[bool] = False  # pyright: ignore[reportIncompatibleVariableOverride, reportIncompatibleMethodOverride]
    arrives_scored: ClassVar[bool] = False  # pyright: ignore[reportIncompatibleVariableOverride, reportIncompatibleMethodOverride]
    perturbs: ClassVar[bool] = False  # pyright: ignore[reportIncompatibleVariableOverride, reportIncompatibleMethodOverride]

    @property
    def mass_reduce(self) -> GroupReduce | None:
        return None  # no score is needed after the prompt
