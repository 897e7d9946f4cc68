"""All heads of a layer keep the same tokens."""

from __future__ import annotations

import dataclasses
from typing import Literal

from kvjax.cache.exchange import mean_over_heads
from kvjax.cache.policy.seen import Prompt, Slots
from kvjax.cache.policy.wrapper import Wrapper
from kvjax.errors import UsageError
from kvjax.typing import Array


@dataclasses.dataclass(frozen=True)
class OverHeads(Wrapper):
    """The mean of another policy's scores over all heads of a layer, which then hold the same tokens.

    Where heads are sharded, every competition is one exchange of a number per slot. The cache stores positions once per
    layer instead of once per head.
    """

    def __post_init__(self) -> None:
        if not self.inner.per_head:
            raise UsageError(f"OverHeads: the heads of {self.inner} keep the same tokens anyway")

    @property
    def per_head(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return False

    @property
    def scope(self) -> Literal["head", "layer"]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return "layer"

    def prompt_scores(self, prompt: Prompt) -> Array:
        return mean_over_heads(self.inner.prompt_scores(prompt))

    def slot_scores(self, slots: Slots) -> Array:
        return mean_over_heads(self.inner.slot_scores(slots))
