"""Budgets that a table gives, head by head."""

from __future__ import annotations

import dataclasses

from kvjax.cache.budget.base import Budget, Full, Table, Uniform
from kvjax.cache.layout import CacheDims
from kvjax.errors import UsageError


@dataclasses.dataclass(frozen=True)
class HeadTable(Table):
    """Another budget for some kv heads: RazorAttention's retrieval heads, DuoAttention's full ones.

    Heads with the same budget share a cache of their own size (`kvjax.cache.head_split`): nothing is allocated for
    what a head may not keep.

    Attributes:
      budgets: what there is to choose from; by default (all tokens, 256 tokens).
      table: for each layer and kv head, which of them; one row serves all layers, and a short row is repeated.
    """

    budgets: tuple[Budget, ...] = (Full(), Uniform(tokens_kept=256))
    table: tuple[tuple[int, ...], ...] = ((1,),)

    def __post_init__(self) -> None:
        entries = [index for row in self.table for index in row]
        if not entries or not all(0 <= index < len(self.budgets) for index in entries):
            raise UsageError(f"HeadTable's table names one of {len(self.budgets)} budgets per head; got {self.table}")
        if any(budget.pooled for budget in self.budgets):
            raise UsageError("HeadTable: heads that adapt to each other cannot be told apart by a table as well")

    def for_layer(self, dims: CacheDims, always: int) -> HeadTable:
        return dataclasses.replace(self, table=(self.table[self._row(self.table, dims)],))

    def by_head(self, dims: CacheDims) -> tuple[tuple[tuple[int, ...], Budget], ...]:
        (row,) = self.for_layer(dims, 0).table
        if dims.kv_heads % len(row):
            raise UsageError(f"HeadTable names budgets for {len(row)} heads; layer {dims.layer} has {dims.kv_heads}")
        row = row * (dims.kv_heads // len(row))
        return tuple(
            (tuple(head for head, index in enumerate(row) if index == which), self.budgets[which])
            for which in sorted(set(row))
        )
