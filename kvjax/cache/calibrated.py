"""Arrays that a part has learnt from a model beforehand, and the check that they fit it."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kvjax.cache.layout import CacheDims
from kvjax.errors import UsageError
from kvjax.typing import PyTree


def as_calibrated(part: object, shapes: PyTree, data: PyTree, dims: CacheDims) -> PyTree:
    """`data` in the dtypes of `shapes`, a pytree of ShapeDtypeStructs.

    Raises:
      UsageError: data is missing, or has another structure or other shapes.
    """
    if data is None:
        raise UsageError(f"{type(part).__name__} has to be calibrated to the model first: see `kvjax calibrate`")
    expected, got = ([jnp.shape(x) for x in jax.tree.leaves(tree)] for tree in (shapes, data))
    if expected != got or jax.tree.structure(shapes) != jax.tree.structure(data):
        raise UsageError(
            f"layer {dims.layer}: {part} was calibrated to arrays of shapes {got}; this model needs {expected}"
        )
    return jax.tree.map(lambda leaf, x: jnp.asarray(x, leaf.dtype), shapes, data)
