"""Random matrices that a seed fixes: rotations and sketches. They are constants of a program, not part of a cache."""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray


@functools.cache
def rotation(dim: int, seed: int) -> NDArray[np.float32]:
    """An orthogonal matrix [dim, dim], uniform over all of them: the Q of Gaussian numbers, with the signs of R."""
    q, r = np.linalg.qr(_generator(seed, dim).standard_normal((dim, dim)))
    return (q * np.sign(np.diag(r))).astype(np.float32)


@functools.cache
def sketch(rows: int, dim: int, seed: int) -> NDArray[np.float32]:
    """[rows, dim], each row uniform over the sphere of radius sqrt(dim); those of each run of `dim` are orthogonal.

    Like Gaussian rows, with less variance (Zandieh et al., 2024, "QJL", arXiv:2406.03482, section 3).
    """
    rng = _generator(seed, dim)
    blocks = [np.linalg.qr(rng.standard_normal((dim, dim)))[0].T for _ in range(-(-rows // dim))]
    return (np.concatenate(blocks)[:rows] * np.sqrt(dim)).astype(np.float32)


def _generator(seed: int, dim: int) -> np.random.Generator:
    """Numbers of its own for each seed and dimension, which nobody draws who seeds a generator with a small number."""
    return np.random.default_rng([0x6B766A6178, seed, dim])
