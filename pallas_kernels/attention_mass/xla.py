"""`attention_mass` for XLA: blocks of queries add their probabilities to one row of masses per kv head."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.lanes import CACHE_BYTES, over_lanes
from pallas_kernels.logits import cap, visible


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
    block = min(tokens, max(8, CACHE_BYTES // (2 * 4 * groups * slots)))
    padding = -tokens % block
    # exp(x - inf) = 0: a query that is invalid, or saw nothing, gives nothing.
    lse = jnp.where(query_valid[:, None, None] & ~jnp.isneginf(lse), lse, jnp.inf)

    def queries(x: jax.Array, axis: int, fill: float = 0) -> jax.Array:
        """Pads the token axis to whole blocks."""
        widths = [(0, 0)] * x.ndim
        widths[axis] = (0, padding)
        return jnp.pad(x, widths, constant_values=fill)

    def lanes(x: jax.Array) -> jax.Array:
        x = jnp.broadcast_to(x, (batch, heads, *x.shape[2:]))
        return x.reshape(batch * heads, *x.shape[2:])

    args = (
        lanes(queries(jnp.where(query_valid[:, None, None, :, None], q.astype(jnp.float32) * scale, 0.0), 3)),
        lanes(queries(lse, 3, jnp.inf)),
        lanes(queries(query_positions, 1)[:, None]),
        lanes(k),
        lanes(key_positions[:, None]),
        lanes(key_valid[:, None]),
    )
    lane = jax.vmap(partial(_lane, block, window, softcap, reduce))
    masses = over_lanes(lane, args, CACHE_BYTES // (2 * 4 * groups * block * slots))
    return masses.reshape(batch, heads, slots)


def _lane(
    block: int,
    window: int | None,
    softcap: float | None,
    reduce: str,
    q: jax.Array,
    lse: jax.Array,
    query_positions: jax.Array,
    k: jax.Array,
    key_positions: jax.Array,
    key_valid: jax.Array,
) -> jax.Array:
    """One (row, kv head): q [G, T, H], lse [G, T], k [S, H] -> [S]."""
    keys = k.astype(jnp.float32)
    groups, tokens, dim = q.shape
    over_group = {"sum": jnp.sum, "mean": jnp.mean, "max": jnp.max}[reduce]

    def mass(part: tuple[jax.Array, ...]) -> jax.Array:
        q, lse, positions = part
        logits = cap(jnp.einsum("gth,sh->gts", q, keys), softcap)
        mask = visible(positions, key_positions, window) & key_valid
        probabilities = jnp.where(mask, jnp.exp(logits - lse[..., None]), 0.0)
        return jnp.sum(over_group(probabilities, axis=0), axis=0)

    blocks = tokens // block
    parts = (
        jnp.moveaxis(q.reshape(groups, blocks, block, dim), 1, 0),
        jnp.moveaxis(lse.reshape(groups, blocks, block), 1, 0),
        query_positions.reshape(blocks, block),
    )
    # The first block starts the sum, so that inside `shard_map` the carry varies over the mesh like what is added.
    first, rest = (jax.tree.map(lambda x, cut=cut: x[cut], parts) for cut in (0, slice(1, None)))
    total, _ = jax.lax.scan(lambda masses, part: (masses + mass(part), None), mass(first), rest)
    return total
