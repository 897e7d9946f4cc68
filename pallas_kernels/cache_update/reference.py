"""The definition of `cache_update`: every entry is the old one, or the fresh one where its block is overwritten."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.rows import Rows, each

PyTree = Any


def run(store: PyTree, fresh: PyTree, block: jax.Array) -> PyTree:
    """See `api.cache_update`."""

    def update(leaf: Any, new: Any) -> Any:
        if isinstance(leaf, Rows):
            return Rows.of(update(leaf.natural(), new.natural()), leaf.fold)
        entry, size = jnp.arange(leaf.shape[2]), new.shape[2]
        chosen = entry // size == block[:, : leaf.shape[1], None]
        chosen = chosen.reshape(*chosen.shape, *(1,) * (leaf.ndim - 3))
        return jnp.where(chosen, jnp.take(new, entry % size, axis=2), leaf).astype(leaf.dtype)

    return each(update, store, fresh)
