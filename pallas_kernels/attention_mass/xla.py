"""`attention_mass` for XLA: a loop over blocks of queries, so that only [B, K, G, block, S] is ever held."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.attention_mass import reference

BLOCK_BYTES = 4 << 20


def run(
    q: jax.Array,
    k: jax.Array,
    lse: jax.Array,
    *,
    query_positions: jax.Array,
    key_positions: jax.Array,
    query_valid: jax.Array,
    key_valid: jax.Array,
    window: int | None,
    scale: float,
    softcap: float | None,
    reduce: str,
) -> jax.Array:
    """See `api.attention_mass`."""
    batch, heads, groups, tokens, _ = q.shape
    slots = k.shape[2]
    block = _block(batch * heads * groups * slots, tokens)
    extra = -tokens % block

    def blocks(x: jax.Array, axis: int) -> jax.Array:
        """[..., T, ...] -> [n, ..., block, ...], padded; padded queries are not valid."""
        padding = [(0, 0)] * x.ndim
        padding[axis] = (0, extra)
        x = jnp.pad(x, padding)
        split = x.reshape(*x.shape[:axis], x.shape[axis] // block, block, *x.shape[axis + 1 :])
        return jnp.moveaxis(split, axis, 0)

    def add(mass: jax.Array, part: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        queries, totals, positions, valid = part
        fresh = reference.run(
            queries,
            k,
            totals,
            query_positions=positions,
            key_positions=key_positions,
            query_valid=valid,
            key_valid=key_valid,
            window=window,
            scale=scale,
            softcap=softcap,
            reduce=reduce,
        )
        return mass + fresh, None

    parts = (blocks(q, 3), blocks(lse, 3), blocks(query_positions, 1), blocks(query_valid, 1))
    mass, _ = jax.lax.scan(add, jnp.zeros((batch, heads, slots), jnp.float32), parts)
    return mass


def _block(per_query: int, tokens: int) -> int:
    """Queries whose probabilities fill about BLOCK_BYTES, at least 1."""
    return max(1, min(tokens, BLOCK_BYTES // (4 * per_query)))
