"""`cache_update` for XLA: a scatter per leaf, which a donated store takes in place."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.rows import Rows, each

PyTree = Any


def run(store: PyTree, fresh: PyTree, block: jax.Array) -> PyTree:
    """See `api.cache_update`."""
    return each(lambda leaf, new: write(leaf, new, block), store, fresh)


def write(leaf: Any, new: Any, block: jax.Array) -> Any:
    """One leaf; block int32 [B, K or 1]."""
    if isinstance(leaf, Rows):
        size, lead = new.slots, leaf.data.shape[:2]
        entries = _entries(block, size)
        return leaf.put(
            jnp.broadcast_to(entries, (*lead, size)), jnp.broadcast_to(new.natural(), (*lead, size, new.width))
        )
    batch, heads = leaf.shape[:2]
    entries = _entries(block, new.shape[2])
    new = jnp.broadcast_to(new, (batch, heads, *new.shape[2:])).astype(leaf.dtype)
    return put(leaf, new, entries[:, :heads], unique=True)


def put(leaf: jax.Array, new: jax.Array, entries: jax.Array, *, unique: bool = False) -> jax.Array:
    """leaf [B, K, n, ...] with new [B, K, m, ...] at entries int32 [B, K or 1, m]; those from n on are left out.

    `unique`: no entry is there twice, nor are those that are left out.
    """
    rows, cols = jnp.arange(leaf.shape[0])[:, None, None], jnp.arange(leaf.shape[1])[None, :, None]
    out = _bits(leaf).at[rows, cols, entries].set(_bits(new), mode="drop", unique_indices=unique)
    return jax.lax.bitcast_convert_type(out, leaf.dtype)


def _entries(block: jax.Array, size: int) -> jax.Array:
    """int32 [B, K or 1, size]: the entries of a block."""
    return block[..., None] * size + jnp.arange(size)


def _bits(x: jax.Array) -> jax.Array:
    """16-bit floats on a CPU as bits: XLA has no such floats there, and would widen all of `x` to write a part."""
    widens = x.dtype in (jnp.bfloat16, jnp.float16) and jax.default_backend() == "cpu"
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if widens else x
