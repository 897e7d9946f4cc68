"""Another codec for each layer."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from kvjax.cache.codec.base import Codec
from kvjax.cache.layout import CacheDims
from kvjax.errors import UsageError
from kvjax.typing import Array, PyTree
from pallas_kernels.loader import Loader

if TYPE_CHECKING:
    from kvjax.cache.policy.seen import Prompt


@dataclasses.dataclass(frozen=True)
class ByLayer(Codec):
    """Layer i is stored as `codecs[i]`, layers beyond the last one like it.

    Bits per element, parameters: those of the layer's codec.

    Attributes:
      codecs: at least one; one for each layer, the last one also for all that follow.
      layer: the layer that this is; `for_layer` sets it, and nothing can be stored before.

    Raises:
      UsageError: no codecs.
    """

    codecs: tuple[Codec, ...]
    layer: int | None = None

    def __post_init__(self) -> None:
        if not self.codecs:
            raise UsageError("ByLayer needs at least one codec")

    def for_layer(self, dims: CacheDims) -> ByLayer:
        return self if self.layer is not None else dataclasses.replace(self, layer=dims.layer)

    @property
    def here(self) -> Codec:
        """The codec of this layer.

        Raises:
          UsageError: this is no layer's yet.
        """
        if self.layer is None:
            raise UsageError("ByLayer stores the tokens of a layer; ask for_layer first")
        return self.codecs[min(self.layer, len(self.codecs) - 1)]

    @property
    def calibrated(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return any(codec.calibrated for codec in self._these)

    @property
    def fits_prompt(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return any(codec.fits_prompt for codec in self._these)

    @property
    def joint(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return any(codec.joint for codec in self._these)

    @property
    def block(self) -> int:
        """Of this layer, or one that suits all layers."""
        return math.lcm(*(codec.block for codec in self._these))

    def validate(self, head_dim: int) -> None:
        for codec in self._these:
            codec.validate(head_dim)

    def parameter_shapes(self, dims: CacheDims) -> PyTree:
        return self.for_layer(dims).here.parameter_shapes(dims)

    def fitted(self, params: PyTree, x: Array, prompt: Prompt) -> PyTree:
        return self.here.fitted(params, x, prompt)

    def encode(self, x: Array, params: PyTree = None) -> PyTree:
        return self.here.encode(x, params)

    def loader(self, store: PyTree, params: PyTree = None) -> Loader:
        return self.here.loader(store, params)

    @property
    def _these(self) -> tuple[Codec, ...]:
        return self.codecs if self.layer is None else (self.here,)
