"""The Pareto plot as SVG: score against bytes, with intervals, in the colours of the reader's light or dark theme."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from importlib import resources
from typing import NamedTuple

from kvjax.evaluation.finding import interval, percent
from kvjax.evaluation.place import Box, place
from kvjax.evaluation.summary import Point, frontier

FOLDER = resources.files("kvjax") / "evaluation"

LABEL_HEIGHT = 14.0
CHARACTER_WIDTH = 6.9
LONGEST_LABEL = 26
NARROW = 600
LONGEST_NARROW_LABEL = 18
MARGIN = 12


class Frame(NamedTuple):
    """The plot's geometry: pixels of the drawing, and the range of bytes that its width spans (logarithmic)."""

    width: float
    height: float
    smallest: float
    largest: float

    @property
    def area(self) -> Box:
        return Box(44.0, 30.0, self.width - 12.0, self.height - 58.0)

    def label(self, name: str) -> str:
        """A method's name, cut to what the drawing has room for; the table beside it has it whole."""
        longest = LONGEST_LABEL if self.width >= NARROW else LONGEST_NARROW_LABEL
        return name if len(name) <= longest else name[: longest - 1] + "…"

    def x(self, size: float) -> float:
        share = math.log(size / self.smallest) / math.log(self.largest / self.smallest)
        return self.area.left + share * (self.area.right - self.area.left)

    def y(self, score: float) -> float:
        return self.area.bottom - score * (self.area.bottom - self.area.top)


def pareto(points: Sequence[Point], *, width: float = 820, height: float = 440, standalone: bool = False) -> str:
    """An SVG of mean score against allocated bytes.

    Args:
      points: at least one; all of one context length.
      width, height: in pixels; text is 12 px, so a page shows the drawing at about its own size.
      standalone: with colours and XML namespace of its own, for a file; otherwise for a page that holds
        `style_sheet()`.
    """
    sizes = [point.row.cache_bytes for point in points]
    frame = Frame(width, height, min(sizes) / 1.3, max(sizes) * 1.3)
    best = frontier(points)
    parts = [_grid(frame, points[0].row.cache_bytes / points[0].row.ratio), _steps(frame, best)]
    parts += [
        _mark(frame, point, box, point in best) for point, box in zip(points, _labels(frame, points, best), strict=True)
    ]
    summary = "; ".join(f"{p.row.method}: {interval(p.score)} in {byte_size(p.row.cache_bytes)}" for p in points)
    drawing = f"<title>Mean score against the bytes of the cache</title><desc>{escape(summary)}</desc>{''.join(parts)}"
    shape = f'class="plot" role="img" width="{width:g}" height="{height:g}"'
    if not standalone:
        return f'<svg {shape} viewBox="0 0 {width:g} {height:g}">{drawing}</svg>'
    box = f"{-MARGIN} {-MARGIN} {width + 2 * MARGIN:g} {height + 2 * MARGIN:g}"
    style = f"<style>{style_sheet()}svg {{ background: var(--paper); }}</style>"
    return f'<svg xmlns="http://www.w3.org/2000/svg" {shape} viewBox="{box}">{style}{drawing}</svg>'


def style_sheet() -> str:
    """The colours, light and dark, and the style of the plot."""
    return (FOLDER / "plot.css").read_text(encoding="utf-8")


def byte_size(size: float) -> str:
    """Bytes as text: "160 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1000 or unit == "GiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if size >= 99.5 or size == int(size) else f"{size:.1f} {unit}"


def _grid(frame: Frame, full_bytes: float) -> str:
    """Axes: quarters of the score, and halvings of the full bf16 cache."""
    area, parts = frame.area, []
    for score in (0, 0.25, 0.5, 0.75, 1):
        y = frame.y(score)
        parts.append(f'<line class="grid" x1="{area.left:g}" x2="{area.right:g}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{area.left - 8:g}" y="{y + 4:.1f}" text-anchor="end">{score:.0%}</text>')
    first, last = (math.log2(size / full_bytes) for size in (frame.smallest, frame.largest))
    for power in range(math.ceil(first), math.floor(last) + 1):
        x, size = frame.x(full_bytes * 2.0**power), full_bytes * 2.0**power
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{area.top:g}" y2="{area.bottom:g}"/>')
        for text, below in ((_fraction(power), 17), (byte_size(size), 31)):
            parts.append(
                f'<text class="tick" x="{x:.1f}" y="{area.bottom + below:g}" text-anchor="middle">{text}</text>'
            )
    parts.append('<text x="0" y="12">mean score of the tasks</text>')
    middle = (area.left + area.right) / 2
    caption = "cache size, as a share of the full bf16 cache"
    parts.append(f'<text x="{middle:g}" y="{area.bottom + 51:g}" text-anchor="middle">{caption}</text>')
    return "".join(parts)


def _fraction(power: int) -> str:
    return f"{2**power}×" if power > 0 else f"1/{2**-power}" if power else "full"


def _steps(frame: Frame, best: Sequence[Point]) -> str:
    """The frontier: what can be had in a given number of bytes."""
    path = []
    for point in best:
        x, y = frame.x(point.row.cache_bytes), frame.y(point.score.mean)
        path.append(f"H{x:.1f}V{y:.1f}" if path else f"M{x:.1f},{y:.1f}")
    return f'<path class="frontier" d="{"".join(path)}H{frame.area.right:g}"/>'


def _steps_boxes(frame: Frame, best: Sequence[Point]) -> list[Box]:
    """What the frontier's line covers."""
    corners = [(frame.x(point.row.cache_bytes), frame.y(point.score.mean)) for point in best]
    ends = [*(x for x, _ in corners[1:]), frame.area.right]
    flat = [Box(x, y - 1, end, y + 1) for (x, y), end in zip(corners, ends, strict=True)]
    rises = [Box(x - 1, y, x + 1, before) for (x, y), (_, before) in zip(corners[1:], corners, strict=False)]
    return flat + rises


def _labels(frame: Frame, points: Sequence[Point], best: Sequence[Point]) -> list[Box]:
    anchors = [(frame.x(p.row.cache_bytes), frame.y(p.score.mean)) for p in points]
    sizes = [(len(frame.label(p.row.method)) * CHARACTER_WIDTH, LABEL_HEIGHT) for p in points]
    dots = [Box(x - 6, y - 6, x + 6, y + 6) for x, y in anchors]
    bars = [
        Box(x - 4, frame.y(p.score.high), x + 4, frame.y(p.score.low))
        for (x, _), p in zip(anchors, points, strict=True)
    ]
    return place(anchors, sizes, [*dots, *bars, *_steps_boxes(frame, best)], frame.area)


def _mark(frame: Frame, point: Point, label: Box, best: bool) -> str:
    """One method: interval, dot, label, and a thin line to the label where it had to move away."""
    row, score = point
    x, y = frame.x(row.cache_bytes), frame.y(score.mean)
    low, high = frame.y(score.low), frame.y(score.high)
    near_x = min(max(x, label.left), label.right)
    near_y = min(max(y, label.top + 3), label.bottom - 3)
    far = math.hypot(near_x - x, near_y - y) > 16
    leader = f'<path class="leader" d="M{x:.1f},{y:.1f}L{near_x:.1f},{near_y:.1f}"/>' if far else ""
    kind = "full" if row.method == "full" else "best" if best else "behind"
    tip = f"{row.method}: {interval(score)} in {byte_size(row.cache_bytes)}, {percent(row.ratio)} of the full cache"
    whisker = f"M{x:.1f},{low:.1f}V{high:.1f}M{x - 4:.1f},{low:.1f}h8M{x - 4:.1f},{high:.1f}h8"
    anchor, text_x = ("start", label.left) if label.left >= x else ("end", label.right)
    if label.left < x < label.right:
        anchor, text_x = "middle", (label.left + label.right) / 2
    return (
        f'<g class="point {kind}"><title>{escape(tip)}</title>{leader}'
        f'<path class="whisker" d="{whisker}"/><circle cx="{x:.1f}" cy="{y:.1f}" r="5"/>'
        f'<text class="label" x="{text_x:.1f}" y="{label.bottom - 3:.1f}" text-anchor="{anchor}">'
        f"{escape(frame.label(row.method))}</text></g>"
    )
