"""`attention_mass` for XLA: blocks of queries add their probabilities to one row of masses per kv head."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.attention_mass.noise import GumbelNoise, gumbel
from pallas_kernels.lanes import CACHE_BYTES, over_lanes
from pallas_kernels.logits import cap, visible


class _Queries(NamedTuple):
    """One lane's queries: q [G, T, H], scaled; lse, factors, both seeds [G, T], or None; positions and valid [T]."""

    q: Any
    lse: Any
    factors: Any
    seeds: Any
    positions: Any
    valid: Any


class _Keys(NamedTuple):
    """One lane's keys: k [S, H]; positions and valid [S]."""

    k: Any
    positions: Any
    valid: Any


def run(
    q: jax.Array,
    k: jax.Array,
    lse: jax.Array | None,
    *,
    query_positions: jax.Array,
    key_positions: jax.Array,
    query_valid: jax.Array,
    key_valid: jax.Array,
    window: int | None,
    scale: float,
    softcap: float | None,
    temperature: jax.Array | None = None,
    noise: GumbelNoise | None = None,
    reduce: str,
    return_lse: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """See `api.attention_mass`."""
    batch, heads, groups, tokens, _ = q.shape
    slots = k.shape[2]
    block = min(tokens, max(8, CACHE_BYTES // (2 * 4 * groups * slots)))
    if temperature is not None and temperature.ndim == 2:
        temperature = jnp.broadcast_to(temperature[:, None, None], q.shape[:4])

    def queries(x: jax.Array, axis: int = 3) -> jax.Array:
        """Pads the token axis to whole blocks, one lane per (row, head)."""
        widths = [(0, 0)] * x.ndim
        widths[axis] = (0, -tokens % block)
        return lanes(jnp.pad(x, widths))

    def lanes(x: jax.Array) -> jax.Array:
        x = jnp.broadcast_to(x, (batch, heads, *x.shape[2:]))
        return x.reshape(batch * heads, *x.shape[2:])

    scaled = jnp.where(query_valid[:, None, None, :, None], q.astype(jnp.float32) * scale, 0.0)
    seeds = None if noise is None else noise.seeds(query_positions, groups)
    args = (
        _Queries(
            q=queries(scaled),
            lse=jax.tree.map(queries, lse),
            factors=jax.tree.map(queries, temperature),
            seeds=jax.tree.map(queries, seeds),
            positions=queries(query_positions[:, None], axis=2),
            valid=queries(query_valid[:, None], axis=2),
        ),
        _Keys(lanes(k), lanes(key_positions[:, None]), lanes(key_valid[:, None])),
    )
    lane = jax.vmap(partial(_lane, block, window, softcap, reduce))
    masses, own = over_lanes(lane, args, CACHE_BYTES // (2 * 4 * groups * block * slots))
    masses = masses.reshape(batch, heads, slots)
    return (masses, own[:, :, :tokens].reshape(q.shape[:4])) if return_lse else masses


def _lane(
    block: int, window: int | None, softcap: float | None, reduce: str, queries: _Queries, keys: _Keys
) -> tuple[jax.Array, jax.Array]:
    """One (row, kv head): the masses [S] and the log-sum-exp that they refer to [G, T]."""
    k = keys.k.astype(jnp.float32)
    over_group = {"sum": jnp.sum, "mean": jnp.mean, "max": jnp.max}[reduce]

    def mass(part: _Queries) -> tuple[jax.Array, jax.Array]:
        logits = cap(jnp.einsum("gth,sh->gts", part.q, k), softcap)
        if part.seeds is not None:
            first, second = part.seeds
            logits += gumbel(first[..., None], second[..., None], keys.positions)
        if part.factors is not None:
            logits *= part.factors[..., None]
        mask = visible(part.positions, keys.positions, window) & keys.valid & part.valid[:, None]
        lse = part.lse
        if lse is None:
            lse = jax.nn.logsumexp(jnp.where(mask, logits, -jnp.inf), axis=-1)
        # exp(x - inf) = 0: a query that saw nothing gives nothing.
        probabilities = jnp.exp(logits - jnp.where(jnp.isneginf(lse), jnp.inf, lse)[..., None])
        return jnp.sum(over_group(jnp.where(mask, probabilities, 0.0), axis=0), axis=0), lse

    parts: _Queries = jax.tree.map(partial(_split, block), queries)
    # The first block starts the sum, so that inside `shard_map` the carry varies over the mesh like what is added.
    start, rest = (jax.tree.map(lambda x, cut=cut: x[cut], parts) for cut in (0, slice(1, None)))
    total, lse = mass(start)

    def add(masses: jax.Array, part: _Queries) -> tuple[jax.Array, jax.Array]:
        more, lse = mass(part)
        return masses + more, lse

    total, others = jax.lax.scan(add, total, rest)
    lse = jnp.concatenate([lse[None], others])
    return total, jnp.moveaxis(lse, 0, 1).reshape(lse.shape[1], -1)


def _split(block: int, x: jax.Array) -> jax.Array:
    """[G, n * block, ...] -> [n, G, block, ...], and [n * block] -> [n, block]."""
    if x.ndim == 1:
        return x.reshape(-1, block)
    return jnp.moveaxis(x.reshape(x.shape[0], -1, block, *x.shape[2:]), 1, 0)
