"""`Board`: what was measured of every method at every size."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from experiments.board.cells import Cell, Kind
from kvjax.evaluation.defaults import REFERENCE
from kvjax.evaluation.summary import Point, Row, frontier, names

KINDS: Mapping[Kind, str] = {
    "evicts": "keep fewer tokens",
    "fewer bits": "keep every token in fewer bits",
    "both": "keep tokens in different precision, or fewer of them in fewer bits",
    "whole": "keep every token exactly",
}


@dataclasses.dataclass(frozen=True)
class Board:
    """Attributes:
    cells: of every method at every size, measured or not.
    rows: what was measured, the reference included, from `summarise`.
    failures: settings that broke, each with its error. missing: methods that would have to be calibrated first.
    sizes: shares of the full bf16 cache, from the largest down.
    config: what was asked: `Plan.config`, `command` (the command line) and `quick` (whether it is a preview).
    info: on what it ran, as run.json.
    """

    cells: Sequence[Cell]
    rows: Sequence[Row]
    failures: Mapping[str, str]
    missing: Sequence[str]
    sizes: Sequence[float]
    config: Mapping[str, Any]
    info: Mapping[str, Any]

    @cached_property
    def measured(self) -> Mapping[str, Row]:
        """The rows of settings that did not break, and of the reference, by setting."""
        return {row.method: row for row in self.rows if row.method not in self.failures}

    @property
    def quick(self) -> bool:
        return self.config["quick"]

    @property
    def full(self) -> Row:
        return self.measured[REFERENCE]

    @cached_property
    def settings(self) -> Mapping[str, Cell]:
        """The cells that were measured, by setting."""
        return {cell.setting: cell for cell in self.cells if cell.setting in self.measured}

    @property
    def tasks(self) -> list[str]:
        return names(row.scores for row in self.rows)

    @property
    def texts(self) -> list[str]:
        return names(row.perplexity for row in self.rows)

    def methods(self, kind: Kind) -> list[str]:
        """The methods of a kind that have a cell, in the order of `kvjax methods`."""
        return list(dict.fromkeys(cell.name for cell in self.cells if cell.kind == kind))

    def at(self, name: str, size: float | None) -> list[Cell]:
        """A method's cells of one size: one, or for None as many as it has besides."""
        return [cell for cell in self.cells if cell.name == name and cell.size == size]

    def best(self, size: float) -> str | None:
        """The setting with the highest mean score of those that take no more than `size`."""
        points = [p for p in self.points() if (cell := self.settings[p.row.method]).size == size and cell.fits]
        return max(points, key=lambda p: p.score.mean).row.method if points else None

    def points(self, kind: Kind | None = None) -> list[Point]:
        """What has a mean score, of one kind or of all; without the reference."""
        chosen = [self.measured[s] for s, cell in self.settings.items() if kind in (None, cell.kind)]
        return [Point(row, row.score) for row in chosen if row.score is not None]

    def front(self, kind: Kind | None = None) -> list[Point]:
        """The Pareto frontier of a kind, or of all and the reference, from the smallest cache up."""
        points = self.points(kind)
        if kind is None and self.full.score is not None:
            points.append(Point(self.full, self.full.score))
        return frontier(points)
