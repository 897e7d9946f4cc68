"""A drawing of all contests of one op: times of the entrants as dots, quartiles as lines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.bench import summary
from experiments.bench.report import milliseconds
from experiments.bench.summary import Record, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OWN, OTHER, INK = "#0b62c4", "#7d8796", "#1a1f29"
ROW_INCHES, PANEL_INCHES, EDGE_INCHES = 0.26, 5.6, 0.75
COLUMNS = 2


def draw(contests: Sequence[Record], path: Path, device: str) -> None:
    """Writes an SVG with a panel per contest, at least one; the same records always give the same file."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    panels = [(contest, summary.rows(contest)) for contest in contests]
    columns = min(COLUMNS, len(panels))
    lines = [panels[i : i + columns] for i in range(0, len(panels), columns)]
    heights = [max(len(found) for _, found in line) * ROW_INCHES + EDGE_INCHES for line in lines]
    with matplotlib.rc_context({"svg.hashsalt": path.name, "font.size": 9, "text.color": INK, "svg.fonttype": "path"}):
        figure = Figure(figsize=(PANEL_INCHES * columns, sum(heights) + 0.3), layout="constrained")
        FigureCanvasSVG(figure)
        grid = figure.add_gridspec(len(lines), columns, height_ratios=heights)
        for i, line in enumerate(lines):
            for j, (contest, found) in enumerate(line):
                _panel(figure.add_subplot(grid[i, j]), contest, found)
        figure.suptitle(f"{contests[0]['op']} on {device}: milliseconds, median and quartiles", fontsize=10)
        figure.savefig(path, format="svg", facecolor="white", metadata={"Date": None})


def _panel(axes: Axes, contest: Record, found: Sequence[Row]) -> None:
    """Fastest first; the label says how many times as fast as the first base an entrant is."""
    ordered = sorted(found, key=lambda row: row.time.median)
    base = next((name for name in contest["bases"] if name in contest["entrants"]), None)
    for y, row in enumerate(ordered):
        color = OWN if row.name.startswith("kvjax") else OTHER
        axes.hlines(y, 1e3 * row.time.low, 1e3 * row.time.high, color=color, linewidth=2, alpha=0.5)
        axes.plot(1e3 * row.time.median, y, "o", color=color, markersize=5)
        axes.annotate(_label(row, base), (1e3 * row.time.high, y), (6, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(ordered)), [row.name for row in ordered])
    axes.set_xscale("log")
    axes.set_xlim(1e3 * ordered[0].time.low / 1.5, 1e3 * max(row.time.high for row in ordered) * 5)
    axes.set_ylim(len(ordered) - 0.5, -0.5)
    axes.set_title(", ".join(f"{name} {value}" for name, value in contest["case"].items()), fontsize=9, loc="left")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.grid(axis="x", color="#d5d9e0", linewidth=0.6)
    axes.set_axisbelow(True)


def _label(row: Row, base: str | None) -> str:
    ratio: Any = row.ratios.get(base) if base is not None else None
    shown = milliseconds(row.time.median)
    return shown if ratio is None else f"{shown}   {ratio.median:.2g} x {base}"
