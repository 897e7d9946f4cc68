"""A board as one self-contained page: Pareto fronts, and a table that sorts by any column and filters by words.

The page asks the network for nothing; every text from outside is escaped. Without its script it is all there, unsorted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import jinja2
from markupsafe import Markup

from experiments.board.board import KINDS, Board
from experiments.board.cells import Cell, size_name
from experiments.board.markdown import headline, made_by
from kvjax.evaluation import plot
from kvjax.evaluation.defaults import REFERENCE
from kvjax.evaluation.figure import byte_size, number, percent
from kvjax.evaluation.summary import Estimate, Point, Row

FOLDER = Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Value:
    """What a table cell shows, what the column is sorted by (None goes last), and small print below."""

    text: str
    key: float | str | None
    small: str = ""


@dataclasses.dataclass(frozen=True)
class Line:
    """A row of the table; `fronts` names the kinds on whose Pareto frontier it is."""

    name: str
    setting: str
    values: Sequence[Value]
    best: bool
    fronts: Sequence[str]
    notes: Sequence[str]


def html(board: Board) -> str:
    """The page."""
    shown = _fronts(board)
    best = {point.row.method for point in board.front()}
    title = f"leaderboard of KV-cache methods, model {board.config['model']}"
    return _template().render(
        title=f"Quick {title}" if board.quick else f"L{title[1:]}",
        quick=board.quick,
        style=Markup(plot.style_sheet() + (plot.FOLDER / "report.css").read_text() + _source("page.css")),
        script=Markup(_source("page.js")),
        findings=headline(board),
        wide=Markup(plot.pareto(shown, width=1040, height=520)) if shown else None,
        narrow=Markup(plot.pareto(shown, width=352, height=300 + 12 * len(shown))) if shown else None,
        columns=_columns(board),
        falling=["size", "mean score", *board.tasks],
        lines=[_line(board, row, best) for row in board.measured.values()],
        kinds=[(kind, text) for kind, text in KINDS.items() if board.methods(kind)],
        failures=board.failures,
        missing=board.missing,
        unreached=[(cell.name, size_name(cell.size), cell.reason) for cell in board.cells if cell.contender is None],
        facts=made_by(board),
        errors=_has_errors(board),
    )


def _fronts(board: Board) -> list[Point]:
    """The full cache and the Pareto frontiers of all and of every kind, under the methods' names."""
    chosen = {p.row.method: p for group in (None, *KINDS) for p in board.front(group)}
    if board.full.score is not None:
        chosen.setdefault(REFERENCE, Point(board.full, board.full.score))
    points = [Point(dataclasses.replace(p.row, method=_name(board, p.row)), p.score) for p in chosen.values()]
    return sorted(points, key=lambda point: point.row.cache_bytes)


def _columns(board: Board) -> list[str]:
    score = ["mean score"] if board.tasks else []
    return [
        "kind",
        "size",
        "of full",
        *score,
        *board.tasks,
        *board.texts,
        "KL",
        *(["attention error"] if _has_errors(board) else []),
        "prefill ms",
        "decode ms/token",
    ]


def _has_errors(board: Board) -> bool:
    """Whether errors of the attention output were measured; a quick board leaves them out."""
    return any(row.attention_error is not None for row in board.rows)


def _line(board: Board, row: Row, best: set[str]) -> Line:
    cell = board.settings.get(row.method)
    values = [
        Value("reference" if cell is None else cell.kind, "" if cell is None else cell.kind),
        _size(cell),
        Value(percent(row.ratio), row.ratio, byte_size(row.cache_bytes)),
        *([_score(row.score)] if board.tasks else []),
        *(_score(row.scores.get(task)) for task in board.tasks),
        *(_number(row.perplexity.get(task), 4) for task in board.texts),
        _number(row.kl, 2),
        *([_number(row.attention_error, 2)] if _has_errors(board) else []),
        _number(row.prefill_ms),
        _number(row.decode_ms_per_token),
    ]
    fronts = [kind for kind in KINDS if row.method in {point.row.method for point in board.front(kind)}]
    return Line(_name(board, row), row.method, values, row.method in best, fronts, row.notes)


def _name(board: Board, row: Row) -> str:
    cell = board.settings.get(row.method)
    return row.method if cell is None else cell.name


def _size(cell: Cell | None) -> Value:
    if cell is None or cell.size is None:
        return Value("–", None)
    return Value(size_name(cell.size), cell.size)


def _score(score: Estimate | None) -> Value:
    if score is None:
        return Value("–", None)
    return Value(f"{100 * score.mean:.0f}", score.mean, f"{100 * score.low:.0f}–{100 * score.high:.0f}")


def _number(value: float | None, digits: int = 3) -> Value:
    return Value(number(value, digits), value)


def _source(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(_source("page.html.j2"))
