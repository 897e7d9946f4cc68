"""The one tolerance table, by which every implementation of every op is compared with its reference."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

TOLERANCE = {"float32": 2e-5, "bfloat16": 8e-3}
"""Largest error relative to the largest magnitude of the reference, by the dtype of the result."""


def assert_close(actual: Any, expected: Any) -> None:
    """Same structure, shapes and dtypes; infinities in the same places; finite values within `TOLERANCE`.

    Raises:
      AssertionError: naming the leaf and the error.
    """
    leaves = jax.tree_util.tree_leaves_with_path(expected)
    others = jax.tree.leaves(actual)
    assert len(leaves) == len(others), f"{len(others)} results, expected {len(leaves)}"
    for (path, want), got in zip(leaves, others, strict=True):
        name = jax.tree_util.keystr(path) or "result"
        assert got.shape == want.shape and got.dtype == want.dtype, f"{name}: {got.shape} {got.dtype}"
        limit = TOLERANCE[str(want.dtype)]
        a, b = np.asarray(got, np.float64), np.asarray(want, np.float64)
        finite = np.isfinite(b)
        assert (np.isfinite(a) == finite).all() and (a[~finite] == b[~finite]).all(), f"{name}: not finite elsewhere"
        if finite.any():
            error = np.abs(a[finite] - b[finite]).max() / max(1.0, np.abs(b[finite]).max())
            assert error <= limit, f"{name}: error {error:.2e} beyond {limit:.0e}"
