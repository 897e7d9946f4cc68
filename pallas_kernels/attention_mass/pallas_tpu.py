"""`attention_mass` for TPU as Pallas kernels: tiles with keys along rows and queries along lanes.

So what belongs to a query (log-sum-exp, temperature, seeds, position) is a row of lanes as it is stored, and masses are
sums (or maxima) over lanes, taken once per tile of keys. Without an `lse`, a first kernel computes it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.attention_mass.noise import GumbelNoise, gumbel
from pallas_kernels.attention_mass.tiles import HIDDEN, IDLE, Axis, Tiles
from pallas_kernels.tile import LANES, LOG2E, LOWEST, dot, fold, scaled, to_columns, wide

MAX_GROUPS, MAX_DIM = 16, 256


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
    """See `api.attention_mass`.

    Raises:
      NotImplementedError: a dtype other than float32 and bfloat16, or mixed ones; G above 16; H above 256.
    """
    _check(q, k)
    tiles = Tiles.of(q, k, window, scale, softcap, reduce, over)
    operands = {"q": q, "k": k}
    if temperature is not None:
        factors = temperature[:, None, None] if temperature.ndim == 2 else temperature
        operands["temperature"] = jnp.broadcast_to(factors, q.shape[:4])
    if noise is not None:
        operands["first"], operands["second"] = noise.seeds(query_positions, tiles.groups)
    at: dict[Axis, jax.Array] = {
        "query": _padded(jnp.where(query_valid, query_positions, IDLE), tiles.queries, IDLE),
        "key": _padded(jnp.where(key_valid, key_positions, HIDDEN), tiles.keys, HIDDEN),
    }
    if lse is None:
        line = (tiles.groups, tiles.queries)
        lse = tiles.call(attention_mass_lse, "query", at, operands, q.shape[:4], {"top": line, "total": line})
    # exp(x - inf) = 0: a query that saw nothing gives nothing.
    operands["lse"] = jnp.where(jnp.isneginf(lse), jnp.inf, lse)
    shape = (*k.shape[:2], 1, k.shape[2])
    mass = tiles.call(attention_mass, "key", at, operands, shape, {"acc": (tiles.keys, LANES)})[:, :, 0]
    return (mass, lse) if return_lse else mass


def _check(q: jax.Array, k: jax.Array) -> None:
    dtypes = {str(q.dtype), str(k.dtype)}
    if dtypes not in ({"float32"}, {"bfloat16"}):
        raise NotImplementedError(f"takes float32 or bfloat16 throughout, not {', '.join(sorted(dtypes))}")
    if q.shape[2] > MAX_GROUPS or q.shape[4] > MAX_DIM:
        raise NotImplementedError(
            f"{q.shape[2]} query heads per kv head with {q.shape[4]} channels; at most {MAX_GROUPS} with {MAX_DIM}"
        )


def _padded(positions: jax.Array, size: int, fill: int) -> jax.Array:
    return jnp.pad(positions, ((0, 0), (0, -positions.shape[1] % size)), constant_values=fill)


def _logits(tiles: Tiles, refs: Mapping[str, Any], g: int, key_at: Any) -> jax.Array:
    """Logits of query head g in base 2 [keys, queries], before the mask; `key_at` [keys, queries] feeds the noise."""
    head = pl.ds(g, 1)
    logits = scaled(dot(refs["k"][...], refs["q"][g], transposed=True), tiles.scale, tiles.softcap)
    if "first" in refs:
        logits = logits + gumbel(refs["first"][head], refs["second"][head], key_at) * LOG2E
    return logits * refs["temperature"][head] if "temperature" in refs else logits


def _over_heads(tiles: Tiles, refs: Mapping[str, Any], masked: bool, one: Callable[[Any, Any], Any], carry: Any) -> Any:
    """Folds `one` over the query heads.

    Unrolled, the product of one head hides behind the exponentials of another. Where noise drowns both, and at the
    edges, which are few, a loop compiles faster.
    """
    return jax.lax.fori_loop(0, tiles.groups, one, carry, unroll=not (masked or "first" in refs))


def _key_at(tiles: Tiles, refs: Mapping[str, Any], needed: bool) -> Any:
    """The position of each key, along rows, in all lanes: int32 [keys, queries], or None where nothing needs it."""
    return wide(to_columns(refs["key_at"]), tiles.queries) if needed else None


def _either(add: Callable[[bool], None], live: Any, clear: Any, refs: Mapping[str, Any]) -> None:
    """`add(masked)` if the tile is live. Beside noise a mask costs nothing, so one form of the code is enough there."""
    if "first" in refs:
        pl.when(live)(lambda: add(True))
    else:
        pl.when(live & clear)(lambda: add(False))
        pl.when(live & ~clear)(lambda: add(True))


def attention_mass_lse(tiles: Tiles, live: Any, clear: Any, refs: Mapping[str, Any]) -> None:
    """The log-sum-exp of every query, tile of keys by tile of keys."""

    @pl.when(pl.program_id(3) == 0)
    def _() -> None:
        refs["top"][...] = jnp.full_like(refs["top"], LOWEST)
        refs["total"][...] = jnp.zeros_like(refs["total"])

    def add(masked: bool) -> None:
        key_at = _key_at(tiles, refs, masked or "first" in refs)

        def one(g: Any, _: None) -> None:
            head = pl.ds(g, 1)
            logits = _logits(tiles, refs, g, key_at)
            if masked:
                logits = jnp.where(tiles.shows(refs["query_at"][...], key_at), logits, -jnp.inf)
            old = refs["top"][head]
            new = jnp.maximum(old, jnp.max(logits, axis=0, keepdims=True))
            more = jnp.sum(jnp.exp2(logits - new), axis=0, keepdims=True)
            refs["total"][head] = refs["total"][head] * jnp.exp2(old - new) + more
            refs["top"][head] = new

        _over_heads(tiles, refs, masked, one, None)

    _either(add, live, clear, refs)

    @pl.when(pl.program_id(3) == pl.num_programs(3) - 1)
    def _() -> None:
        total = refs["total"][...]
        some = total > 0
        lse = refs["top"][...] / LOG2E + jnp.log(jnp.where(some, total, 1.0))
        refs["result"][...] = jnp.where(some, lse, -jnp.inf)


def attention_mass(tiles: Tiles, live: Any, clear: Any, refs: Mapping[str, Any]) -> None:
    """The mass of every key, tile of queries by tile of queries."""
    over_queries, over_lanes = (jnp.maximum, jnp.max) if tiles.over == "max" else (jnp.add, jnp.sum)

    @pl.when(pl.program_id(3) == 0)
    def _() -> None:
        refs["acc"][...] = jnp.zeros_like(refs["acc"])

    def add(masked: bool) -> None:
        key_at = _key_at(tiles, refs, masked or "first" in refs)
        join = jnp.maximum if tiles.reduce == "max" else jnp.add

        def one(g: Any, mass: jax.Array) -> jax.Array:
            probabilities = jnp.exp2(_logits(tiles, refs, g, key_at) - refs["lse"][pl.ds(g, 1)] * LOG2E)
            return join(mass, probabilities)

        mass = _over_heads(tiles, refs, masked, one, jnp.zeros((tiles.keys, tiles.queries), jnp.float32))
        if masked:
            mass = jnp.where(tiles.shows(refs["query_at"][...], key_at), mass, 0.0)
        refs["acc"][...] = over_queries(refs["acc"][...], fold(mass, over_queries))

    _either(add, live, clear, refs)

    @pl.when(pl.program_id(3) == pl.num_programs(3) - 1)
    def _() -> None:
        mass = over_lanes(refs["acc"][...].T, axis=0, keepdims=True)
        refs["result"][...] = mass * (1.0 / tiles.groups) if tiles.reduce == "mean" else mass
