"""Where the labels of a scatter plot go, so that none covers a point, a bar or another label.

Boxes are float arrays [..., 4]: left, bottom, right, top, in pixels; y grows upwards.
"""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray

Boxes = NDArray[np.float64]

#: How far from its point a label may be, in pixels; the nearest free place wins.
DISTANCES = (7.0, 16.0, 30.0, 44.0, 60.0, 80.0, 104.0)
#: How many pixels further away a label goes rather than cover one square pixel of something else.
PIXELS_PER_AREA = 0.5
#: Directions in the order in which they read best: right, left, above, below, then the corners.
DIRECTIONS = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1))


def place(anchors: NDArray[np.float64], sizes: NDArray[np.float64], obstacles: Boxes, area: Boxes) -> Boxes:
    """A box for each label, [n, 4]: inside `area`, near its anchor, with the least overlap.

    Labels with the fewest free places are served first: a lonely point never takes a crowded one's only place.

    Args:
      anchors: the points, [n, 2]. sizes: width and height of the labels, [n, 2].
      obstacles: what should stay uncovered, [m, 4]. area: where labels may be, [4].
    """
    options, distance = _options(anchors, sizes, area)
    freedom = [int(np.sum(overlap(boxes, obstacles) == 0)) for boxes in options]
    placed = np.zeros((len(anchors), 4))
    for index in np.argsort(freedom, kind="stable"):
        cost = PIXELS_PER_AREA * overlap(options[index], obstacles) + distance[index]
        placed[index] = options[index, np.argmin(cost)]
        obstacles = np.concatenate([obstacles, placed[index][None]])
    return placed


def overlap(boxes: Boxes, others: Boxes) -> NDArray[np.float64]:
    """How many square pixels of each box [n, 4] the others [m, 4] cover, [n]; counted again for each of them."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    return np.prod(np.maximum(high - low, 0.0), axis=-1).sum(axis=1)


def _options(
    anchors: NDArray[np.float64], sizes: NDArray[np.float64], area: Boxes
) -> tuple[Boxes, NDArray[np.float64]]:
    """Places around each anchor, [n, places, 4], moved inside the area, and how far away they read, [n, places]."""
    choices = list(itertools.product(DISTANCES, DIRECTIONS))
    ways = np.array([direction for _, direction in choices], float)
    reach = np.array([distance if 0 in direction else 0.7 * distance for distance, direction in choices])
    centres = anchors[:, None] + ways * (reach[:, None] + sizes[:, None] / 2)
    boxes = np.concatenate([centres - sizes[:, None] / 2, centres + sizes[:, None] / 2], axis=-1)
    inwards = np.maximum(area[:2] - boxes[..., :2], 0) - np.maximum(boxes[..., 2:] - area[2:], 0)
    far = [distance + DIRECTIONS.index(direction) for distance, direction in choices]
    return boxes + np.tile(inwards, 2), far + np.abs(inwards).sum(axis=-1)
