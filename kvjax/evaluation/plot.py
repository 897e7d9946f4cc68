"""The Pareto plot as SVG: score against bytes, with intervals, in the colours of the reader's light or dark theme."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from html import escape
from importlib import resources
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from kvjax.evaluation.defaults import REFERENCE
from kvjax.evaluation.figure import byte_size, interval, percent
from kvjax.evaluation.place import Boxes, place
from kvjax.evaluation.summary import Point, frontier

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FOLDER = resources.files("kvjax") / "evaluation"

#: Comes with matplotlib, so that names take the same room everywhere; a page shows them in its own, narrower font.
FONT = "DejaVu Sans"
NARROW = 600
LONGEST_LABEL, LONGEST_NARROW_LABEL = 26, 18
LEAST_TICK_DISTANCE = 56
#: Pixels around the axes: left, below, right, above; and around a drawing that is a file.
EDGES, MARGIN = (44, 58, 12, 30), 12
#: Between two names on one line, in pixels.
GAP = 4
#: From this distance on, in pixels, a line leads from a name to its dot.
FAR = 16


def pareto(points: Sequence[Point], *, width: int = 820, height: int = 440, standalone: bool = False) -> str:
    """An SVG of mean score against allocated bytes; the same points always give the same text.

    Args:
      points: at least one; all of one context length.
      width, height: in pixels; text is 12 px, so a page shows the drawing at about its own size.
      standalone: with colours and XML namespace of its own, for a file; otherwise for a page that holds
        `style_sheet()`.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    file, size = io.StringIO(), np.array([width, height])
    # The salt goes into the names of shared shapes: two drawings in one page must not have the same.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": f"{width} {height}", "font.family": FONT}):
        matplotlib.rcParams["font.size"] = 12
        figure = Figure(figsize=tuple(size / 72), dpi=72, frameon=False)  # at 72 dpi a point is a pixel
        FigureCanvasSVG(figure)
        inner = size - EDGES[:2] - EDGES[2:]
        axes = figure.add_axes(tuple(np.concatenate([EDGES[:2] / size, inner / size])), frameon=False)
        _scales(axes, points)
        _dots(axes, points)
        _names(axes, points, LONGEST_LABEL if width >= NARROW else LONGEST_NARROW_LABEL)
        figure.savefig(file, format="svg")
    drawing = _summary(points) + _themed(file.getvalue(), points)
    shape = f'class="plot" role="img" width="{width}" height="{height}"'
    if not standalone:
        return f'<svg {shape} viewBox="0 0 {width} {height}">{drawing}'
    box = f"{-MARGIN} {-MARGIN} {width + 2 * MARGIN} {height + 2 * MARGIN}"
    style = f"<style>{style_sheet()}svg {{ background: var(--paper); }}</style>"
    return f'<svg xmlns="http://www.w3.org/2000/svg" {shape} viewBox="{box}">{style}{drawing}'


def style_sheet() -> str:
    """The colours, light and dark, and the style of the plot."""
    return (FOLDER / "plot.css").read_text(encoding="utf-8")


def _palette() -> dict[str, str]:
    """The colours of the light theme, by name."""
    return dict(re.findall(r"--(\w+): (#\w{6})", style_sheet().split("@media")[0]))


def _scales(axes: Axes, points: Sequence[Point]) -> None:
    """Quarters of the score, and halvings of the full bf16 cache."""
    colours, sizes = _palette(), [point.row.cache_bytes for point in points]
    full = points[0].row.cache_bytes / points[0].row.ratio
    largest = 1.3 * max(sizes)
    first, last = math.floor(math.log2(min(sizes) / full)), math.floor(math.log2(largest / full))
    axes.set_xscale("log", base=2)
    axes.set(xlim=(full * 2.0**first / 1.1, largest), ylim=(0, 1))
    every = math.ceil(LEAST_TICK_DISTANCE * (last - first + 1) / axes.bbox.width)
    ticks = {full * 2.0**power: _fraction(power) for power in range(last, first - 1, -every)}
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"])
    axes.minorticks_off()
    axes.tick_params(length=0, pad=7, labelcolor=colours["soft"])
    axes.grid(color=colours["line"], linewidth=1, clip_on=False)
    axes.set_axisbelow(True)

    for size in ticks:
        _write(axes, byte_size(size), (size, 0), (0, -31), color=colours["soft"], ha="center")
    middle = math.sqrt(math.prod(axes.get_xlim()))
    caption = "cache size, as a share of the full bf16 cache"
    _write(axes, caption, (middle, 0), (0, -51), color=colours["ink"], ha="center")
    _write(axes, "mean score of the tasks", (axes.get_xlim()[0], 1), (-EDGES[0], 18), color=colours["ink"])


def _write(axes: Axes, text: str, place: tuple[float, float], pixels: tuple[float, float], **style: str) -> None:
    """Text at a distance from a place of the plot."""
    axes.annotate(text, place, xytext=pixels, textcoords="offset points", **style)  # pyright: ignore[reportArgumentType]


def _fraction(power: int) -> str:
    return f"{2**power}×" if power > 0 else f"1/{2**-power}" if power else "full"


def _dots(axes: Axes, points: Sequence[Point]) -> None:
    """The methods with their intervals, and the frontier: what can be had in a given number of bytes."""
    colours, best = _palette(), frontier(points)
    steps = np.array(_corners(axes, best)).T
    axes.step(*steps, where="post", color=colours["accent"], alpha=0.55, linewidth=2, clip_on=False)
    for index, point in enumerate(points):
        row, score = point
        filled = colours["accent" if point in best else "muted"]
        edge, face = (colours["ink"], colours["paper"]) if row.method == REFERENCE else (filled, filled)
        error = [[score.mean - score.low], [score.high - score.mean]]
        bar = {"color": edge, "elinewidth": 1.5, "capsize": 4, "capthick": 1.5, "clip_on": False}
        dot = {"fmt": "o", "ms": 9, "mec": edge, "mfc": face, "mew": 2, "zorder": 3}
        axes.errorbar([row.cache_bytes], [score.mean], error, **bar, **dot).lines[0].set_gid(f"point-{index}")


def _names(axes: Axes, points: Sequence[Point], longest: int) -> None:
    """Names beside the dots, with a thin line to the dot where a name had to move away."""
    from matplotlib.transforms import IdentityTransform

    colours, pixels, best = _palette(), IdentityTransform(), frontier(points)
    style = {"transform": pixels, "va": "center", "color": colours["ink"], "parse_math": False, "gid": "label"}
    texts = [
        axes.text(0, 0, _short(point.row.method, longest), weight="bold" if point in best else "normal", **style)
        for point in points
    ]
    sizes = np.add([text.get_window_extent().size for text in texts], (GAP, 0))
    dots = axes.transData.transform([(point.row.cache_bytes, point.score.mean) for point in points])
    area = np.add(axes.bbox.extents, (0, 0, 0, EDGES[3] / 2))
    for text, dot, box in zip(texts, dots, place(dots, sizes, _obstacles(axes, points), area), strict=True):
        near = np.clip(dot, np.add(box[:2], (0, 3)), np.subtract(box[2:], (0, 3)))
        if math.dist(dot, near) > FAR:
            axes.plot(*zip(dot, near, strict=True), transform=pixels, color=colours["muted"], linewidth=1, zorder=1.5)
        # Anchored on the side of the dot: in another font a name is shorter or longer on the far side.
        side = "left" if box[0] >= dot[0] else "right" if box[2] <= dot[0] else "center"
        x = {"left": box[0] + GAP / 2, "right": box[2] - GAP / 2, "center": (box[0] + box[2]) / 2}[side]
        text.set(x=x, y=(box[1] + box[3]) / 2, ha=side)


def _short(name: str, longest: int) -> str:
    """A method's name, cut to what the drawing has room for; the table beside it has it whole."""
    return name if len(name) <= longest else name[: longest - 1] + "…"


def _corners(axes: Axes, best: Sequence[Point]) -> list[tuple[float, float]]:
    """The frontier's points, and where its line ends."""
    corners = [(point.row.cache_bytes, point.score.mean) for point in best]
    return [*corners, (axes.get_xlim()[1], corners[-1][1])]


def _obstacles(axes: Axes, points: Sequence[Point]) -> Boxes:
    """What dots, intervals and the frontier's line cover, in pixels."""
    boxes = []
    for row, score in points:
        (x, low), (_, middle), (_, high) = axes.transData.transform(
            [(row.cache_bytes, value) for value in (score.low, score.mean, score.high)]
        )
        boxes += [(x - 6, middle - 6, x + 6, middle + 6), (x - 4, low, x + 4, high)]
    for (x, y), (end, top) in pairwise(axes.transData.transform(_corners(axes, frontier(points)))):
        boxes += [(x, y - 1, end, y + 1), (end - 1, y, end + 1, top)]
    return np.array(boxes)


def _summary(points: Sequence[Point]) -> str:
    said = "; ".join(f"{p.row.method}: {interval(p.score)} in {byte_size(p.row.cache_bytes)}" for p in points)
    return f"<title>Mean score against the bytes of the cache</title><desc>{escape(said)}</desc>"


def _themed(drawing: str, points: Sequence[Point]) -> str:
    """What matplotlib drew, without its header, in the page's font and colours, and with a tip at each point."""
    drawing = drawing[drawing.index('<g id="figure_1">') :].replace("xlink:href", "href")
    for name, colour in _palette().items():
        drawing = drawing.replace(colour, f"var(--{name})")

    def tip(found: re.Match[str]) -> str:
        row, score = points[int(found[1])]
        size = f"{byte_size(row.cache_bytes)}, {percent(row.ratio)} of the full cache"
        return f"<g><title>{escape(f'{row.method}: {interval(score)} in {size}')}</title>"

    drawing = re.sub(r'<g id="point-(\d+)">', tip, drawing).replace('id="label"', 'class="label"')
    shared = set(re.findall(r'href="#(\w+)"', drawing))
    drawing = re.sub(r' id="([^"]+)"', lambda found: found[0] if found[1] in shared else "", drawing)
    return drawing.replace(f"'{FONT}'", "var(--font)")
