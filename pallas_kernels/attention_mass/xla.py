"""`attention_mass` for XLA: blocks of queries give their probabilities to one row of masses per kv head.

A block computes with one of at most `MAX_SPANS` prefixes of the keys, the shortest that holds all keys which a query of
it sees: where queries and keys are the tokens of a prompt, most of the masked half of the square is never computed.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.attention_mass.noise import GumbelNoise, gumbel
from pallas_kernels.lanes import CACHE_BYTES, over_lanes
from pallas_kernels.logits import cap, visible

MAX_SPANS = 4
"""Every prefix is compiled. Four compute 5/8 of a causal square."""


NOTHING = -1
"""The position of a query that sees no key."""


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
    over: str = "sum",
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
    ends = _ends(slots, tokens, block)
    last = jnp.where(query_valid, query_positions, NOTHING)
    last = jnp.pad(last, ((0, 0), (0, -tokens % block)), constant_values=NOTHING).reshape(batch, -1, block).max(2)
    prefix = _prefixes(ends, last, jnp.where(key_valid, key_positions, jnp.iinfo(jnp.int32).max))
    lane = jax.vmap(partial(_lane, block, window, softcap, reduce, over, ends, prefix))
    masses, own = over_lanes(lane, args, CACHE_BYTES // (2 * 4 * groups * block * slots))
    masses = masses.reshape(batch, heads, slots)
    return (masses, own[:, :, :tokens].reshape(q.shape[:4])) if return_lse else masses


def _ends(slots: int, tokens: int, block: int) -> tuple[int, ...]:
    """How many keys each prefix holds; all of them alone where queries are few, for these are a prompt's last ones."""
    number = min(MAX_SPANS, -(-tokens // block)) if 2 * tokens >= slots else 1
    return tuple(-(-slots * n // number) for n in range(1, number + 1))


def _prefixes(ends: tuple[int, ...], last: jax.Array, key_positions: jax.Array) -> jax.Array:
    """int32 [n], which prefix each block of queries needs, all rows being asked.

    last: int32 [B, n], the last position that a query of each block has. key_positions: int32 [B, S], large where a
    key is invalid.
    """
    beyond = [key_positions[:, end:].min(axis=1, keepdims=True) <= last for end in ends[:-1]]
    return sum((seen.any(0).astype(jnp.int32) for seen in beyond), start=jnp.zeros(last.shape[1:], jnp.int32))


def _lane(
    block: int,
    window: int | None,
    softcap: float | None,
    reduce: str,
    over: str,
    ends: tuple[int, ...],
    prefix: jax.Array,
    queries: _Queries,
    keys: _Keys,
) -> tuple[jax.Array, jax.Array]:
    """One (row, kv head): the masses [S] and the log-sum-exp that they refer to [G, T]."""
    k = keys.k.astype(jnp.float32)
    over_group = {"sum": jnp.sum, "mean": jnp.mean, "max": jnp.max}[reduce]
    over_queries, join = {"sum": (jnp.sum, jnp.add), "max": (jnp.max, jnp.maximum)}[over]

    def mass(shown: _Keys, part: _Queries) -> tuple[jax.Array, jax.Array]:
        """Of the first keys: [S], 0 behind them."""
        positions, valid = shown.positions, shown.valid
        logits = cap(jnp.einsum("gth,sh->gts", part.q, shown.k), softcap)
        if part.seeds is not None:
            first, second = part.seeds
            logits += gumbel(first[..., None], second[..., None], positions)
        if part.factors is not None:
            logits *= part.factors[..., None]
        mask = visible(part.positions, positions, window) & valid & part.valid[:, None]
        lse = part.lse
        if lse is None:
            lse = jax.nn.logsumexp(jnp.where(mask, logits, -jnp.inf), axis=-1)
        # exp(x - inf) = 0: a query that saw nothing gives nothing.
        probabilities = jnp.exp(logits - jnp.where(jnp.isneginf(lse), jnp.inf, lse)[..., None])
        masses = over_queries(over_group(jnp.where(mask, probabilities, 0.0), axis=0), axis=0)
        return jnp.pad(masses, (0, len(k) - len(masses))), lse

    # Cut before the loop, which would copy a prefix for every block.
    spans = [partial(mass, _Keys(k[:end], keys.positions[:end], keys.valid[:end])) for end in ends]

    def add(masses: jax.Array, step: tuple[_Queries, jax.Array]) -> tuple[jax.Array, jax.Array]:
        part, which = step
        more, lse = jax.lax.switch(which, spans, part)
        return join(masses, more), lse

    # Made of the keys, so that inside `shard_map` the carry varies over the mesh like what is added.
    nothing = jnp.where(jnp.isnan(k[:, 0]), 0.0, 0.0)
    total, lse = jax.lax.scan(add, nothing, (jax.tree.map(partial(_split, block), queries), prefix))
    return total, jnp.moveaxis(lse, 0, 1).reshape(lse.shape[1], -1)


def _split(block: int, x: jax.Array) -> jax.Array:
    """[G, n * block, ...] -> [n, G, block, ...], and [n * block] -> [n, block]."""
    if x.ndim == 1:
        return x.reshape(-1, block)
    return jnp.moveaxis(x.reshape(x.shape[0], -1, block, *x.shape[2:]), 1, 0)
