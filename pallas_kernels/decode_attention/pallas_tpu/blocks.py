"""Which blocks of slots a step has to read: what is dead is neither fetched nor computed."""

from __future__ import annotations

import jax
import jax.numpy as jnp

DEAD, PARTIAL, WHOLE = 0, 1, 2


def states(
    slots: int,
    block: int,
    lengths: jax.Array,
    valid: jax.Array | None,
    positions: jax.Array | None,
    query_positions: jax.Array | None,
    window: int | None,
) -> jax.Array:
    """int32 [B, blocks]: DEAD where no query of any head sees a slot, WHOLE where all see all.

    Args:
      slots, block: S and slots per block.
      lengths: int32 [B, K or 1]; slots from there on are not valid.
      valid, positions, query_positions, window: as in the op.
    """
    count = -(-slots // block)
    start = jnp.arange(count, dtype=jnp.int32) * block
    if valid is None and window is None:
        some, every = start < jnp.max(lengths, 1)[:, None], start + block <= jnp.min(lengths, 1)[:, None]
    else:
        seen = jnp.arange(slots, dtype=jnp.int32) < lengths[..., None]
        every_seen = seen = seen if valid is None else seen & valid
        if window is not None:
            assert positions is not None and query_positions is not None
            first, last = (f(query_positions, axis=1)[:, None, None] for f in (jnp.min, jnp.max))
            every_seen = seen & (last - positions < window)
            seen = seen & (first - positions < window)
        some, every = _per_block(seen, count, block, jnp.any), _per_block(every_seen, count, block, jnp.all)
    return jnp.where(every, WHOLE, jnp.where(some, PARTIAL, DEAD)).astype(jnp.int32)


def together(state: jax.Array, rows: int) -> jax.Array:
    """int32 [B / rows, blocks]: the states of some rows at once."""
    state = state.reshape(-1, rows, state.shape[-1])
    every, some = jnp.all(state == WHOLE, axis=1), jnp.any(state != DEAD, axis=1)
    return jnp.where(every, WHOLE, jnp.where(some, PARTIAL, DEAD)).astype(jnp.int32)


def fetched(state: jax.Array) -> jax.Array:
    """int32 [n, blocks]: the block that is in memory at each step. A dead one stays with its neighbour's."""
    index = jnp.arange(state.shape[1], dtype=jnp.int32)
    live = state != DEAD
    last = jax.lax.cummax(jnp.where(live, index, -1), axis=1)
    first = jnp.argmax(live, axis=1).astype(jnp.int32)
    return jnp.maximum(last, first[:, None])


def _per_block(x: jax.Array, count: int, block: int, reduce: object) -> jax.Array:
    """bool [B, blocks] of bool [B, n, S]."""
    x = jnp.pad(x, ((0, 0), (0, 0), (0, count * block - x.shape[2])))
    x = x.reshape(*x.shape[:2], count, block)
    return reduce(x, axis=(1, 3))  # type: ignore[operator]
