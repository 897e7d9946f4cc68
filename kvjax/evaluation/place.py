"""Where the labels of a scatter plot go, so that none covers a point, a bar or another label."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple


class Box(NamedTuple):
    """A rectangle; y grows downwards, as in SVG."""

    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: Box) -> float:
        """The area that both cover."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(width, 0.0) * max(height, 0.0)

    def inside(self, other: Box) -> bool:
        return (
            self.left >= other.left
            and self.right <= other.right
            and self.top >= other.top
            and self.bottom <= other.bottom
        )


#: How far from its point a label may be, in pixels; the nearest free place wins.
DISTANCES = (9.0, 18.0, 30.0, 44.0, 60.0, 80.0, 104.0)
#: How many pixels further away a label goes rather than cover one square pixel of something else.
PIXELS_PER_AREA = 0.5
#: Directions in the order in which they read best: right, left, above, below, then the corners.
DIRECTIONS = ((1, 0), (-1, 0), (0, -1), (0, 1), (1, -1), (1, 1), (-1, -1), (-1, 1))


def place(
    anchors: Sequence[tuple[float, float]], sizes: Sequence[tuple[float, float]], obstacles: Sequence[Box], area: Box
) -> list[Box]:
    """A box of the given (width, height) for each anchor: inside `area`, near its anchor, with the least overlap.

    Anchors with the fewest free places are served first: a lonely point never takes a crowded one's only place.
    """
    options = [_options(anchor, size, area) for anchor, size in zip(anchors, sizes, strict=True)]
    freedom = [sum(not _covered(box, obstacles) for box, _ in choices) for choices in options]
    placed: dict[int, Box] = {}
    for index in sorted(range(len(anchors)), key=lambda i: freedom[i]):
        taken = [*obstacles, *placed.values()]
        placed[index], _ = min(
            options[index], key=lambda option: PIXELS_PER_AREA * _covered(option[0], taken) + option[1]
        )
    return [placed[index] for index in range(len(anchors))]


def _options(anchor: tuple[float, float], size: tuple[float, float], area: Box) -> list[tuple[Box, float]]:
    """Possible boxes inside the area with their cost, nearest first; the nearest one moved inside if none fits."""
    (x, y), (width, height) = anchor, size
    boxes = []
    for distance, (across, down) in itertools.product(DISTANCES, DIRECTIONS):
        reach = distance if 0 in (across, down) else distance * 0.7
        centre_x = x + across * (reach + width / 2)
        centre_y = y + down * (reach + height / 2)
        box = Box(centre_x - width / 2, centre_y - height / 2, centre_x + width / 2, centre_y + height / 2)
        boxes.append((box, distance + DIRECTIONS.index((across, down))))
    fitting = [option for option in boxes if option[0].inside(area)]
    return fitting or [(_moved_inside(boxes[0][0], area), 0.0)]


def _moved_inside(box: Box, area: Box) -> Box:
    right = min(max(area.left - box.left, 0.0) + box.right, area.right)
    bottom = min(max(area.top - box.top, 0.0) + box.bottom, area.bottom)
    return Box(right - (box.right - box.left), bottom - (box.bottom - box.top), right, bottom)


def _covered(box: Box, taken: Sequence[Box]) -> float:
    return sum(box.overlap(other) for other in taken)
