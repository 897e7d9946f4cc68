"""How a number that goes with codes (a scale, a norm, an outlier) is stored: as it is, or in sixteen bits."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.oracles.quantised import bfloat16

Stored = Callable[[np.ndarray], np.ndarray]
"""An array as computed -> the array that decoding finds."""


def as_is(x: np.ndarray) -> np.ndarray:
    """Nothing is lost."""
    return np.asarray(x, np.float64)


def bfloat16_up(x: np.ndarray) -> np.ndarray:
    """The nearest numbers of eight significant bits that are not below."""
    return np.vectorize(lambda number: bfloat16(float(number), up=True), otypes=[np.float64])(x)


def bfloat16_down(x: np.ndarray) -> np.ndarray:
    """The nearest numbers of eight significant bits that are not above."""
    return np.vectorize(lambda number: bfloat16(float(number), up=False), otypes=[np.float64])(x)


def bfloat16_nearest(x: np.ndarray) -> np.ndarray:
    """The nearest numbers of eight significant bits; halfway, the even one."""
    mantissa, exponent = np.frexp(np.asarray(x, np.float64))
    return np.ldexp(np.round(mantissa * 256) / 256, exponent)
