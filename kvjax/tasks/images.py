"""Small coloured pictures of ten shapes, drawn by arithmetic: data for image models that nobody has to download.

One shape stands somewhere in the picture, at any angle and of any size and colour, before a textured background and
under a stroke or two that belong to no shape. Nothing but its outline tells what it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from kvjax.errors import UsageError

Numbers = NDArray[np.floating]
SIZE = 32
"""Pixels of a side."""


@dataclasses.dataclass(frozen=True)
class Style:
    """How hard the pictures are to tell apart; ranges are those of uniform draws.

    Attributes:
      radius: of the shape, in pixels, about half of its extent.
      shift: the most that its centre is off the picture's, in pixels, each way.
      turn: the most that it is turned, in radians, each way; pi is any angle.
      stretch: the most by which one of its axes is longer than the other, as a share.
      contrast: distance of its colour from the background's, in units of half the range of a channel.
      tint: 1 for a colour that differs in any direction, down to 0 for one that is always lighter.
      texture: the most that waves and a slope change the background, in the same units.
      strokes: lines across the picture, each of a colour of its own.
      noise: standard deviation of what is added to each channel of each pixel, in the same units.
    """

    radius: tuple[float, float] = (5.0, 11.0)
    shift: float = 6.0
    turn: float = np.pi
    stretch: float = 0.25
    contrast: tuple[float, float] = (0.5, 1.2)
    tint: float = 1.0
    texture: float = 0.3
    strokes: int = 2
    noise: float = 0.2


STYLE = Style()


def _box(x: Numbers, y: Numbers, width: float, height: float) -> Numbers:
    return np.minimum(width - np.abs(x), height - np.abs(y))


def _triangle(x: Numbers, y: Numbers) -> Numbers:
    sides = [x * np.float32(np.cos(turn)) + y * np.float32(np.sin(turn)) for turn in np.pi * np.array([1, 3, 5]) / 3]
    return 0.5 - np.maximum.reduce(sides)


def _star(x: Numbers, y: Numbers) -> Numbers:
    return 0.65 + 0.35 * np.cos(5 * np.arctan2(y, x)) - np.hypot(x, y)


#: How far inside a shape of radius 1 a point is; negative outside. x, y f32 [...] -> f32 [...].
SHAPES: Mapping[str, Callable[[Numbers, Numbers], Numbers]] = MappingProxyType(
    {
        "disc": lambda x, y: 0.8 - np.hypot(x, y),
        "ring": lambda x, y: 0.2 - np.abs(np.hypot(x, y) - 0.75),
        "square": lambda x, y: _box(x, y, 0.75, 0.75),
        "triangle": _triangle,
        "star": _star,
        "cross": lambda x, y: np.maximum(_box(x, y, 0.9, 0.25), _box(x, y, 0.25, 0.9)),
        "crescent": lambda x, y: np.minimum(0.9 - np.hypot(x, y), np.hypot(x - 0.45, y) - 0.7),
        "bar": lambda x, y: _box(x, y, 0.95, 0.3),
        "corner": lambda x, y: np.maximum(_box(x + 0.5, y, 0.25, 0.75), _box(x, y + 0.5, 0.75, 0.25)),
        "tee": lambda x, y: np.maximum(_box(x, y - 0.1, 0.25, 0.8), _box(x, y + 0.6, 0.8, 0.25)),
    }
)
CLASSES = tuple(SHAPES)
"""Names of the labels 0 to 9."""

_ALL = tuple(range(len(CLASSES)))


def image_batch(
    seed: int | Sequence[int], count: int, classes: Sequence[int] = _ALL, style: Style = STYLE
) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Pictures and what they show, each class as likely as another.

    Args:
      seed: at least 0; pictures of different seeds share nothing, so one seed can train and another test. With the same
        seed, picture i does not depend on `count`.
      count: n.
      classes: labels to draw from, in 0..9, for class-incremental learning.
      style: how hard they are.

    Returns:
      images f32 [n, 32, 32, 3] in [-1, 1], and labels int32 [n], values of `classes`.

    Raises:
      UsageError: no class, or one that does not exist.
    """
    if not classes or not set(classes) <= set(_ALL):
        raise UsageError(f"classes must be some of 0 to {len(CLASSES) - 1}, got {tuple(classes)}; see images.CLASSES")
    path = [seed] if isinstance(seed, int) else list(seed)
    draws = _Draws(np.random.default_rng([*path, 0]).random((count, _COLUMNS + 7 * style.strokes), np.float32))
    labels = np.asarray(classes, np.int32)[(draws.take(1)[:, 0] * len(classes)).astype(int)]
    ground = draws.take(3) - 0.5
    images = ground[:, None, None] + style.texture * _texture(draws)[..., None] * (2 * draws.take(3) - 1)[:, None, None]
    lighter = (1 - style.tint) / np.sqrt(3)
    colour = ground + draws.within(*style.contrast) * (style.tint * _direction(draws.take(3)) + np.float32(lighter))
    images = _over(images, colour, _shape(draws, labels, style))
    for _ in range(style.strokes):
        images = _over(images, 2 * draws.take(3) - 1, _stroke(draws))
    noise = np.random.default_rng([*path, 1]).standard_normal(images.shape, np.float32)
    return np.clip(images + style.noise * noise, -1, 1).astype(np.float32, copy=False), labels


_COLUMNS = 21
"""Numbers that a picture without strokes is made of."""
_Y, _X = np.mgrid[:SIZE, :SIZE].astype(np.float32)[:, None] - np.float32((SIZE - 1) / 2)


class _Draws:
    """Uniform numbers in [0, 1), a row per picture, taken column by column."""

    def __init__(self, numbers: Numbers) -> None:
        self._numbers, self._taken = numbers, 0

    def take(self, columns: int) -> Numbers:
        """[n, columns] that nobody has had."""
        start, self._taken = self._taken, self._taken + columns
        return self._numbers[:, start : self._taken]

    def within(self, low: float, high: float) -> Numbers:
        """[n, 1] between two bounds."""
        return np.float32(low) + np.float32(high - low) * self.take(1)

    def plane(self, low: float, high: float) -> Numbers:
        """[n, 1, 1], to meet pixels."""
        return self.within(low, high)[..., None]


def _over(images: Numbers, colour: Numbers, cover: Numbers) -> Numbers:
    """Paints colour [n, 3] over images [n, 32, 32, 3] where cover [n, 32, 32] is 1."""
    return images + cover[..., None] * (colour[:, None, None] - images)


def _direction(numbers: Numbers) -> Numbers:
    """Unit vectors [n, 3] of numbers in [0, 1)."""
    vectors = numbers - np.float32(0.5)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.float32(1e-6))


def _texture(draws: _Draws) -> Numbers:
    """Waves and a slope [n, 32, 32] in about [-1, 1]; takes five numbers."""
    turn, length, phase = draws.plane(0, 2 * np.pi), draws.plane(4, 16), draws.plane(0, 2 * np.pi)
    waves = np.sin(2 * np.pi / length * (_X * np.cos(turn) + _Y * np.sin(turn)) + phase)
    return (waves + (draws.plane(-1, 1) * _X + draws.plane(-1, 1) * _Y) / (SIZE / 2)) / 2


def _shape(draws: _Draws, labels: NDArray[np.int32], style: Style) -> Numbers:
    """How much of each pixel the shape covers, [n, 32, 32]; takes five numbers."""
    radius, turn = draws.plane(*style.radius), draws.plane(np.pi - style.turn, np.pi + style.turn)
    x = _X - draws.plane(-style.shift, style.shift)
    y = _Y - draws.plane(-style.shift, style.shift)
    stretch = np.sqrt(1 + draws.plane(-style.stretch, style.stretch))
    along = (x * np.cos(turn) + y * np.sin(turn)) / (radius * stretch)
    across = (y * np.cos(turn) - x * np.sin(turn)) / radius * stretch
    inside = np.empty_like(along)
    for label in np.unique(labels):
        here = labels == label
        inside[here] = SHAPES[CLASSES[label]](along[here], across[here])
    return np.clip(np.float32(0.5) + inside * radius, 0, 1)


def _stroke(draws: _Draws) -> Numbers:
    """How much of each pixel a line covers, [n, 32, 32]; takes four numbers."""
    turn, offset, width = draws.plane(0, np.pi), draws.plane(-16, 16), draws.plane(0.3, 1.0)
    opacity = draws.plane(0.3, 0.9)
    return opacity * np.clip(width + 0.5 - np.abs(_X * np.cos(turn) + _Y * np.sin(turn) - offset), 0, 1)
