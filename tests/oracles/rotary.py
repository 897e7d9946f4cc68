"""Rotary embedding, rotate-half form (Su et al. 2021; the channel layout of Llama)."""

from __future__ import annotations

import numpy as np


def rotate(x: np.ndarray, position: float, theta: float) -> np.ndarray:
    """Turn channel pairs (i, i + H/2) of `x` [..., H] by the angle position · theta^(-2i/H)."""
    half = x.shape[-1] // 2
    angle = np.array([position * theta ** (-2.0 * i / x.shape[-1]) for i in range(half)])
    first, second = x[..., :half], x[..., half:]
    turned = [first * np.cos(angle) - second * np.sin(angle), second * np.cos(angle) + first * np.sin(angle)]
    return np.concatenate(turned, axis=-1)


def rotate_each(x: np.ndarray, positions: np.ndarray, theta: float) -> np.ndarray:
    """`rotate` with one position per leading index: x [T, ..., H], positions [T]."""
    return np.stack([rotate(token, float(position), theta) for token, position in zip(x, positions, strict=True)])
