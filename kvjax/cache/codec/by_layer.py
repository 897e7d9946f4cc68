"""Another codec for each layer."""

from __future__ import annotations

import dataclasses
import math
from typing import Never

from kvjax.cache.codec.base import Codec
from kvjax.cache.layout import CacheDims
from kvjax.errors import UsageError
from kvjax.typing import Array, PyTree


@dataclasses.dataclass(frozen=True)
class ByLayer(Codec):
    """Layer i is stored by `codecs[i]`, layers beyond the last one like it: `for_layer` gives the layer's codec.

    Until then it says what a method must know of all layers, and stores nothing.

    Attributes:
      codecs: at least one; one for each layer, the last one also for all that follow.

    Raises:
      UsageError: no codecs.
    """

    codecs: tuple[Codec, ...]

    def __post_init__(self) -> None:
        if not self.codecs:
            raise UsageError("ByLayer needs at least one codec")

    def for_layer(self, dims: CacheDims) -> Codec:
        return self.codecs[min(dims.layer, len(self.codecs) - 1)].for_layer(dims)

    @property
    def calibrated(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return any(codec.calibrated for codec in self.codecs)

    @property
    def fits_prompt(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return any(codec.fits_prompt for codec in self.codecs)

    @property
    def joint(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return any(codec.joint for codec in self.codecs)

    @property
    def block(self) -> int:
        """One that suits all layers."""
        return math.lcm(*(codec.block for codec in self.codecs))

    def validate(self, head_dim: int) -> None:
        for codec in self.codecs:
            codec.validate(head_dim)

    def encode(self, x: Array, params: PyTree = None) -> Never:
        raise UsageError("ByLayer stores the tokens of a layer; ask for_layer first")

    def loader(self, store: PyTree, params: PyTree = None) -> Never:
        raise UsageError("ByLayer stores the tokens of a layer; ask for_layer first")
