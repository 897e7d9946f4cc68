"""The tables that a terminal shows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from experiments.bench import summary
from experiments.bench.summary import Record, Row, Spread

if TYPE_CHECKING:
    from rich.console import Console

NAIVE = "naive"


def show(console: Console, contest: Record, platform: str) -> None:
    """Prints one contest: its entrants, and who was left out and why."""
    from rich.table import Table

    found = summary.rows(contest)
    bases = list(dict.fromkeys(base for row in found for base in row.ratios))
    columns = list(_columns(found, bases, platform))
    table = Table(title=summary.title(contest), title_justify="left", box=None, padding=(0, 1), header_style="bold")
    for name, _ in columns:
        table.add_column(name, justify="left" if not name else "right", overflow="fold")
    for row in found:
        table.add_row(*(cell(row) for _, cell in columns))
    console.print(table)
    for name, reason in contest["left_out"].items():
        console.print(f"  {name} is left out. {reason}", style="dim", markup=False)
    console.print()


def _columns(found: list[Row], bases: list[str], platform: str) -> Iterator[tuple[str, Any]]:
    """(heading, function of a row)."""
    yield "", lambda row: row.name
    yield "ms", lambda row: milliseconds(row.time.median)
    yield "quartiles", lambda row: f"{milliseconds(row.time.low)} – {milliseconds(row.time.high)}"
    if platform == "cpu":
        yield "processor\nms", lambda row: milliseconds(row.processor)
    yield "moved\nMB", lambda row: f"{row.moves / 1e6:.3g}"
    yield "GB/s", lambda row: f"{row.bandwidth / 1e9:.3g}"
    if any(row.of_read is not None for row in found):
        yield "of\nreading", lambda row: f"{100 * row.of_read:.0f} %"
    yield "temporary\nMB", lambda row: "–" if row.temporaries is None else f"{row.temporaries / 1e6:.3g}"
    fixed = [base for base in bases if not base.startswith(NAIVE)]
    for base in [*fixed, NAIVE] if len(fixed) < len(bases) else fixed:
        yield f"x {base}", lambda row, base=base: times(_against(base, row.ratios))
        if platform == "cpu":
            yield "processor\nx", lambda row, base=base: brief(_against(base, row.processor_ratios))


def _against(base: str, ratios: dict[str, Spread]) -> Spread | None:
    """The ratio to an entrant whose name starts with `base`: each format has a naive one of its own."""
    return next((ratio for name, ratio in ratios.items() if name.startswith(base)), None)


def milliseconds(seconds: float) -> str:
    """With three digits, from 0.001 on."""
    value = 1e3 * seconds
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}" if value >= 0.1 else f"{value:.3f}"


def times(spread: Spread | None) -> str:
    """ "2.5 (2.3–2.6)": a ratio with its quartiles."""
    return "" if spread is None else f"{spread.median:.2f} ({spread.low:.2f}–{spread.high:.2f})"


def brief(spread: Spread | None) -> str:
    """ "2.5"."""
    return "" if spread is None else f"{spread.median:.2f}"
