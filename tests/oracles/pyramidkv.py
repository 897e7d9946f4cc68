"""PyramidKV (Cai et al. 2024): SnapKV with budgets that fall linearly from the first layer to the last."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from tests.oracles.row import Row, Trace
from tests.oracles.snapkv import snapkv


def pyramid_ends(before: float, places: float, beta: float) -> tuple[float, float]:
    """The places, besides the window, of the first layer and of the last.

    before: prompt tokens before the window. places: the mean over layers of the places besides the window.
    The last layer gets places / beta; the first what keeps the mean. A first layer that would get all of `before` or
    more is clamped to it, and the last one then gets what keeps the mean.
    """
    last = places / beta
    first = 2 * places - last
    if first >= before:
        first = before
        last = 2 * places - first
    return first, last


def pyramid_budgets(*, layers: int, prompt: int, capacity: int, window: int, beta: float) -> np.ndarray:
    """Tokens kept by each layer, the window among them, before rounding: [L], of mean `capacity`.

    A model of one layer gets `capacity` (the published step divides by zero there); a prompt that fits is kept whole.
    """
    if prompt <= capacity:
        return np.full(layers, float(prompt))
    first, last = pyramid_ends(prompt - window, capacity - window, beta)
    if layers == 1:
        return np.array([float(capacity)])
    step = (first - last) / (layers - 1)
    return np.array([window + first - layer * step for layer in range(layers)])


def pyramid_budgets_floor(*, layers: int, prompt: int, capacity: int, window: int, beta: int) -> np.ndarray:
    """With integers, as released: every division rounds down, so that up to L tokens of budget are lost. [L]."""
    if prompt <= capacity or layers == 1:
        return np.full(layers, min(prompt, capacity))
    places, before = capacity - window, prompt - window
    last = places // beta
    first = 2 * places - last
    if first >= before:
        first, last = before, 2 * places - before
    step = (first - last) // (layers - 1)
    return np.array([window + first - layer * step for layer in range(layers)])


def pyramid_budgets_kvpress(*, layers: int, prompt: int, keep: float, window: int, beta: float) -> np.ndarray:
    """As in kvpress, for a kept share `keep` of the prompt: [L]; the window competes and is not added.

    Where not prompt >= first >= last >= window, every layer gets the uniform budget of SnapKV: small budgets and short
    prompts silently are SnapKV. Rounding is half to even.
    """
    first, last = pyramid_ends(prompt - window, prompt * keep, beta)
    if not prompt >= first >= last >= window:
        return np.array([round(prompt * keep)] * layers)
    step = (first - last) / (layers - 1)
    return np.array([round(first - layer * step) for layer in range(layers)])


def pyramidkv(rows: Sequence[Row], budgets: Sequence[int], *, window: int, kernel: int) -> list[Trace]:
    """One row per layer, each compressed once after the prompt by SnapKV to its own budget."""
    return [
        snapkv(row, capacity=math.floor(budget), window=window, kernel=kernel)
        for row, budget in zip(rows, budgets, strict=True)
    ]
