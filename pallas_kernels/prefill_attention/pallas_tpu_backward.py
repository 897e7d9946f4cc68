"""The backward kernels of `prefill_attention` for TPU: probabilities are recomputed from the log-sum-exp, twice.

With x the capped logit, f the temperature and p = exp(f x - lse): d(f x) = p (dout·v + shift), where
shift = dlse - dout·out. One kernel walks by query tile and sums over keys (dq, dtemperature), the other by key tile and
sums over queries (dk, dv). The second works on transposed tiles, where what belongs to a query is a row of lanes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.prefill_attention.walk import Step, Tiles
from pallas_kernels.tile import LANES, LOG2E, dot, fold, index, to_columns, to_rows, wide


def backward(
    tiles: Tiles,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    temperature: jax.Array | None,
    lengths: jax.Array,
    lse: jax.Array,
    shift: jax.Array,
    dout: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Gradients of `forward`; `dout` is like `out`, `shift` like `lse`.

    Returns:
      (dq, dk, dv, dtemperature) like their arguments.
    """
    tiles = tiles.backward
    dq, dtemperature = _by_query(tiles, q, k, v, temperature, lengths, lse, shift, dout)
    dk, dv = _by_key(tiles, q, k, v, temperature, lengths, lse, shift, dout)
    return dq, dk, dv, dtemperature


def _by_query(tiles: Tiles, q: jax.Array, k: jax.Array, v: jax.Array, temperature: jax.Array | None, *rest: jax.Array):
    operands = _operands(tiles, "query", q, k, v, temperature, *rest)
    results = {"dq": (jax.ShapeDtypeStruct(q.shape, q.dtype), tiles.spec("query", "query", tiles.dim, result=True))}
    column = (tiles.rows, LANES)
    scratch = {"acc": (tiles.rows, tiles.dim), "lse_column": column, "shift_column": column}
    if temperature is not None:
        results["dtemperature"] = (
            jax.ShapeDtypeStruct(temperature.shape, jnp.float32),
            tiles.spec("query", "query", result=True),
        )
        scratch |= {"factor": column, "dfactor": column}
    grads = tiles.call(prefill_attention_dq, "query", rest[0], q.shape[1], operands, results, scratch)
    return grads[0], grads[1] if temperature is not None else None


def _by_key(tiles: Tiles, q: jax.Array, k: jax.Array, v: jax.Array, temperature: jax.Array | None, *rest: jax.Array):
    batch, heads = q.shape[:2]
    # Where the query heads of a kv head fill several tiles, each gives a part of the sum.
    shape = jax.ShapeDtypeStruct((batch, heads, *k.shape[2:]), k.dtype if tiles.splits == 1 else jnp.float32)
    spec = tiles.spec("key", "key", tiles.dim, share=1, result=True)
    operands = _operands(tiles, "key", q, k, v, temperature, *rest)
    results = {"dk": (shape, spec), "dv": (shape, spec)}
    scratch = {"dk_acc": (tiles.keys, tiles.dim), "dv_acc": (tiles.keys, tiles.dim)}
    grads = tiles.call(prefill_attention_dkv, "key", rest[0], heads, operands, results, scratch)
    return (x.reshape(batch, -1, tiles.splits, *x.shape[2:]).sum(2).astype(k.dtype) for x in grads)


def _operands(tiles: Tiles, by: Any, q: Any, k: Any, v: Any, temperature: Any, _: Any, lse: Any, shift: Any, dout: Any):
    queries, lines = tiles.spec("query", by, tiles.dim), tiles.spec("query", by)
    keys = tiles.spec("key", by, tiles.dim, share=tiles.splits)
    operands = {"q": (q, queries), "k": (k, keys), "v": (v, keys), "dout": (dout, queries)}
    operands |= {"lse": (lse, lines), "shift": (shift, lines)}
    return operands if temperature is None else operands | {"temperature": (temperature, lines)}


def _dlogits(tiles: Tiles, logits: jax.Array, factor: jax.Array | None, dheated: jax.Array) -> jax.Array:
    """From d(f x) to d(scaled product): through the temperature and the cap; `logits` is x in base 2."""
    if factor is not None:
        dheated = dheated * factor
    if tiles.softcap is None:
        return dheated
    return dheated * (1.0 - jnp.square(logits * (1.0 / (tiles.softcap * LOG2E))))


def prefill_attention_dq(tiles: Tiles, step: Step, refs: Mapping[str, Any]) -> None:
    """The kernel of dq and dtemperature; all rows of a query tile together, as in the forward pass."""
    i, j, length = step.major, step.minor, step.length

    @pl.when(step.first)
    def _() -> None:
        refs["acc"][...] = jnp.zeros_like(refs["acc"])
        refs["lse_column"][...] = to_columns(refs["lse"]) * LOG2E
        refs["shift_column"][...] = to_columns(refs["shift"])
        if "temperature" in refs:
            refs["factor"][...] = to_columns(refs["temperature"])
            refs["dfactor"][...] = jnp.zeros_like(refs["dfactor"])

    def add(masked: bool) -> None:
        q, dout = (refs[name][...].reshape(tiles.rows, tiles.dim) for name in ("q", "dout"))
        k, v = refs["k"][...], refs["v"][...]
        if masked:
            inside = index(j * tiles.keys, tiles.keys, 0) < length
            k, v = jnp.where(inside, k, 0), jnp.where(inside, v, 0)
        logits = tiles.logits(dot(q, k, transposed=True))
        factor = wide(refs["factor"][...], tiles.keys) if "factor" in refs else None
        heated = logits if factor is None else logits * factor
        weights = jnp.exp2(heated - wide(refs["lse_column"][...], tiles.keys))
        if masked:
            query, key = index(i * tiles.queries, tiles.queries, 0), index(j * tiles.keys, tiles.keys, 1)
            by_head = weights.reshape(tiles.groups, tiles.queries, tiles.keys)
            weights = jnp.where(tiles.sees(query, key, length), by_head, 0.0).reshape(weights.shape)
        dheated = weights * (dot(dout, v, transposed=True) + wide(refs["shift_column"][...], tiles.keys))
        if factor is not None:
            refs["dfactor"][...] += fold(dheated * logits)
        refs["acc"][...] += dot(_dlogits(tiles, logits, factor, dheated).astype(k.dtype), k)

    live, edge = tiles.live(i, j, length), tiles.edge(i, j, length)
    pl.when(live & edge)(lambda: add(masked=True))
    pl.when(live & ~edge)(lambda: add(masked=False))

    @pl.when(step.last)
    def _() -> None:
        real = index(i * tiles.queries, tiles.queries, 0) < length
        dq = (refs["acc"][...] * tiles.scale).reshape(refs["dq"].shape)
        refs["dq"][...] = jnp.where(real, dq, 0.0).astype(refs["dq"].dtype)
        if "dfactor" in refs:
            sums = jnp.sum(refs["dfactor"][...], axis=1, keepdims=True) * (1.0 / LOG2E)
            by_head = jnp.broadcast_to(sums, (tiles.rows, LANES)).reshape(tiles.groups, tiles.queries, LANES)
            to_rows(refs["dtemperature"], jnp.where(real, by_head, 0.0).reshape(tiles.rows, LANES))


def prefill_attention_dkv(tiles: Tiles, step: Step, refs: Mapping[str, Any]) -> None:
    """The kernel of dk and dv; one query head after the other, keys along rows, queries along lanes."""
    i, j, length = step.minor, step.major, step.length

    @pl.when(step.first)
    def _() -> None:
        refs["dk_acc"][...] = jnp.zeros_like(refs["dk_acc"])
        refs["dv_acc"][...] = jnp.zeros_like(refs["dv_acc"])

    def add(g: int, masked: bool) -> None:
        q, dout = refs["q"][g], refs["dout"][g]
        lse, shift = refs["lse"][g : g + 1] * LOG2E, refs["shift"][g : g + 1]
        factor = refs["temperature"][g : g + 1] if "temperature" in refs else None
        query = index(i * tiles.queries, tiles.queries, 1)
        if masked:
            inside = index(i * tiles.queries, tiles.queries, 0) < length
            q, dout = jnp.where(inside, q, 0), jnp.where(inside, dout, 0)
            shift = jnp.where(query < length, shift, 0.0)
            factor = None if factor is None else jnp.where(query < length, factor, 0.0)
        logits = tiles.logits(dot(refs["k"][...], q, transposed=True))
        weights = jnp.exp2((logits if factor is None else logits * factor) - lse)
        if masked:
            weights = jnp.where(tiles.sees(query, index(j * tiles.keys, tiles.keys, 0), length), weights, 0.0)
        dheated = weights * (dot(refs["v"][...], dout, transposed=True) + shift)
        refs["dv_acc"][...] += dot(weights.astype(dout.dtype), dout)
        refs["dk_acc"][...] += dot(_dlogits(tiles, logits, factor, dheated).astype(q.dtype), q)

    def add_all(masked: bool) -> None:
        for g in range(tiles.groups):
            add(g, masked)

    live, edge = tiles.live(i, j, length), tiles.edge(i, j, length)
    pl.when(live & edge)(lambda: add_all(masked=True))
    pl.when(live & ~edge)(lambda: add_all(masked=False))

    @pl.when(step.last)
    def _() -> None:
        real = index(j * tiles.keys, tiles.keys, 0) < length
        refs["dk"][...] = jnp.where(real, refs["dk_acc"][...] * tiles.scale, 0.0).astype(refs["dk"].dtype)
        refs["dv"][...] = jnp.where(real, refs["dv_acc"][...], 0.0).astype(refs["dv"].dtype)
