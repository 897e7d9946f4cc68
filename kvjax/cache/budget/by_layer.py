"""Budgets that a table gives, layer by layer."""

from __future__ import annotations

import dataclasses

import numpy as np

from kvjax.cache.budget.base import Budget, Layered, Table
from kvjax.cache.layout import CacheDims
from kvjax.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Prefix(Layered):
    """PrefixKV (Wang et al., 2024, arXiv:2412.03409): each layer's share of the tokens, found on sample prompts.

    Attributes:
      shares: one number per layer; only their proportions matter (`kvjax calibrate --method prefixkv` finds them).
    """

    shares: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.shares or min(self.shares) < 0 or sum(self.shares) <= 0:
            raise UsageError(f"Prefix needs shares that are not negative, at least one above 0; got {self.shares}")
        if self.layer is not None and len(self.shares) not in (1, self.layers):
            raise UsageError(f"Prefix has shares for {len(self.shares)} layers; the model has {self.layers}")

    def weights(self) -> np.ndarray:
        shares = np.array(self.shares if len(self.shares) > 1 else self.shares * self.layers)
        return shares / shares.mean()


@dataclasses.dataclass(frozen=True)
class LayerTable(Table):
    """Another budget for some layers: SimLayerKV's lazy ones, the first layers that are left whole.

    Attributes:
      budgets: what there is to choose from.
      table: for each layer, which of them; one entry serves all layers.
    """

    table: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        if not self.table or not all(0 <= index < len(self.budgets) for index in self.table):
            raise UsageError(f"LayerTable's table names one of {len(self.budgets)} budgets per layer; got {self.table}")

    @property
    def pooled(self) -> bool:
        return any(budget.pooled for budget in self.budgets)

    def for_layer(self, dims: CacheDims, always: int) -> Budget:
        return self.budgets[self.table[self._row(self.table, dims)]].for_layer(dims, always)
