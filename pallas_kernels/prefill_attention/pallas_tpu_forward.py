"""The forward kernel of `prefill_attention` for TPU: flash attention (Dao, 2023, arXiv:2307.08691), tile by tile.

With a `selection`, tiles of queries are visited in order, and one row of numbers per head, resident in VMEM, holds how
much earlier tiles have hidden of every key.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.prefill_attention.walk import Step, Tiles
from pallas_kernels.tile import LANES, LOG2E, LOWEST, dot, fold, index, to_columns, to_rows, wide


def forward(
    tiles: Tiles,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    temperature: jax.Array | None,
    lengths: jax.Array,
    selection: tuple[jax.Array, jax.Array] | None = None,
) -> tuple[jax.Array, ...]:
    """Attention of every query tile to the key tiles that it sees.

    Args:
      q: [B, N, groups, T, H]. k, v: [B, K, T, H].
      temperature: f32 [B, N, groups, T] or None.
      lengths: int32 [B].
      selection: (queries, keys) [B, J, T, C] with J = K or 1, or None.

    Returns:
      out like q, lse f32 [B, N, groups, T]; with `selection` also hidden f32 [B, N, T].
    """
    batch, heads = q.shape[:2]
    queries = tiles.spec("query", "query", tiles.dim)
    keys = tiles.spec("key", "query", tiles.dim, share=tiles.splits)
    operands = {"q": (q, queries), "k": (k, keys), "v": (v, keys)}
    results = {
        "out": (jax.ShapeDtypeStruct(q.shape, q.dtype), tiles.spec("query", "query", tiles.dim, result=True)),
        "lse": (jax.ShapeDtypeStruct(q.shape[:-1], jnp.float32), tiles.spec("query", "query", result=True)),
    }
    scratch = {"acc": (tiles.rows, tiles.dim), "top": (tiles.rows, LANES), "total": (tiles.rows, LANES)}
    if temperature is not None:
        operands["temperature"] = (temperature, tiles.spec("query", "query"))
        scratch["factor"] = (tiles.rows, LANES)
    if selection is None:
        out, lse = tiles.call(prefill_attention, "query", lengths, heads, operands, results, scratch)
        return out, lse
    for name, axis, x in zip(("chooser", "chosen"), ("query", "key"), selection, strict=True):
        operands[name] = (x, tiles.spec(axis, "query", x.shape[-1], share=heads // x.shape[1]))
    parts = pl.cdiv(tiles.tokens, tiles.keys) * tiles.keys // tiles.part
    hidden = jax.ShapeDtypeStruct((batch, heads, parts, 1, tiles.part), jnp.float32)
    results["hidden"] = (hidden, pl.BlockSpec((None, None, *hidden.shape[2:]), lambda b, n, *_: (b, n, 0, 0, 0)))
    out, lse, total = tiles.call(prefill_attention, "query", lengths, heads, operands, results, scratch)
    return out, lse, total.reshape(batch, heads, -1)[..., : tiles.tokens]


def prefill_attention(tiles: Tiles, step: Step, refs: Mapping[str, Any]) -> None:
    """The kernel; `refs` as in `forward`."""
    i, j, length = step.major, step.minor, step.length

    @pl.when(step.first)
    def _() -> None:
        refs["acc"][...] = jnp.zeros_like(refs["acc"])
        refs["top"][...] = jnp.full_like(refs["top"], LOWEST)
        refs["total"][...] = jnp.zeros_like(refs["total"])
        if "temperature" in refs:
            refs["factor"][...] = to_columns(refs["temperature"])

    if "hidden" in refs:

        @pl.when(pl.program_id(2) == 0)
        def _() -> None:
            refs["hidden"][...] = jnp.zeros_like(refs["hidden"])

    live, edge = tiles.live(i, j, length), tiles.edge(i, j, length)

    @pl.when(live & ~edge)
    def _() -> None:
        for part in range(tiles.keys // tiles.part):
            _attend(tiles, step, refs, part, masked=False)

    @pl.when(live & edge)
    def _() -> None:
        first, last = 0, jnp.minimum(length, (i + 1) * tiles.queries) - j * tiles.keys
        if tiles.window is not None:
            first = jnp.maximum(0, i * tiles.queries - tiles.window + 1 - j * tiles.keys)
        last = jnp.minimum(jax.lax.div(last + tiles.part - 1, tiles.part), tiles.keys // tiles.part)
        body = lambda part, _: _attend(tiles, step, refs, part, masked=True)  # noqa: E731
        jax.lax.fori_loop(jax.lax.div(first, tiles.part), last, body, None)

    @pl.when(step.last)
    def _() -> None:
        norm = jnp.sum(refs["total"][...], axis=1, keepdims=True)
        real = index(i * tiles.queries, tiles.queries, 0) < length
        out = (refs["acc"][...] * (1.0 / norm)).reshape(refs["out"].shape)
        refs["out"][...] = jnp.where(real, out, 0.0).astype(refs["out"].dtype)
        lse = (refs["top"][...] / LOG2E + jnp.log(norm)).reshape(tiles.groups, tiles.queries, LANES)
        to_rows(refs["lse"], jnp.where(real, lse, -jnp.inf).reshape(tiles.rows, LANES))


def _attend(tiles: Tiles, step: Step, refs: Mapping[str, Any], part: Any, masked: bool) -> None:
    """One step of the online softmax: all rows of the query tile and one part of the key tile."""
    start = part * tiles.part
    span = pl.ds(start if isinstance(start, int) else pl.multiple_of(start, tiles.part), tiles.part)
    query = index(step.major * tiles.queries, tiles.queries, 0)
    key = step.minor * tiles.keys + start
    values = refs["v"][span, :]
    by_head = (tiles.groups, tiles.queries, tiles.part)
    logits = tiles.logits(dot(refs["q"][...].reshape(tiles.rows, tiles.dim), refs["k"][span, :], transposed=True))
    if "factor" in refs:
        logits = logits * wide(refs["factor"][...], tiles.part)
    if "hidden" in refs:
        hidden = _hide(tiles, step, refs, part, span, masked) * LOG2E
        logits = (logits.reshape(by_head) - hidden).reshape(logits.shape)
    if masked:
        seen = tiles.sees(query, index(key, tiles.part, 1), step.length)
        logits = jnp.where(seen, logits.reshape(by_head), -jnp.inf).reshape(logits.shape)
        # 0 · NaN is NaN: what lies behind the row's end must not meet a probability.
        values = jnp.where(index(key, tiles.part, 0) < step.length, values, 0)
    old = refs["top"][...]
    new = jnp.maximum(old, jnp.max(logits, axis=1, keepdims=True))
    weights = jnp.exp2(logits - wide(new, tiles.part))
    fade = jnp.exp2(old - new)
    refs["top"][...] = new
    refs["total"][...] = refs["total"][...] * fade + fold(weights)
    refs["acc"][...] = refs["acc"][...] * wide(fade, tiles.dim) + dot(weights.astype(values.dtype), values)


def _hide(tiles: Tiles, step: Step, refs: Mapping[str, Any], part: Any, span: Any, masked: bool) -> jax.Array:
    """What earlier queries have hidden of one part of the keys [queries, part]; adds what this tile's queries hide."""
    products = dot(refs["chooser"][...], refs["chosen"][span, :], transposed=True)
    chosen = jnp.maximum(products * tiles.scale, 0.0)
    if masked:
        query = index(step.major * tiles.queries, tiles.queries, 0)
        key = index(step.minor * tiles.keys + part * tiles.part, tiles.part, 1)
        chosen = jnp.where(tiles.sees(query, key, step.length) & (key < query), chosen, 0.0)
    # A product with a triangle is the exclusive running sum over queries.
    triangle = jnp.where(index(0, LANES, 1) < index(0, LANES, 0), 1.0, 0.0)
    at = step.minor * (tiles.keys // tiles.part) + part
    total, hidden = refs["hidden"][at], []
    for r in range(0, tiles.queries, LANES):
        rows = chosen[r : r + LANES]
        hidden.append(total + dot(triangle, rows))
        total = total + jnp.sum(rows, axis=0, keepdims=True)
    refs["hidden"][at] = total
    return jnp.concatenate(hidden, axis=0)
