"""`prefill_attention` for TPU: flash attention with a recomputing backward pass, as Pallas kernels.

Algorithm: Dao, 2023 (arXiv:2307.08691). Products run in the dtype of the inputs (float32 inputs at full precision,
bfloat16 inputs with probabilities rounded to bfloat16) and accumulate in float32; exponentials are base 2.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.prefill_attention.tile import LANES, LOG2E, Tiles, dot, to_columns, to_rows, wide

LOWEST = -1e30
"""Where a running maximum starts: finite, so that exp2(masked - maximum) is exp2(-inf), never exp2(-inf + inf)."""


def run(q, k, v, *, valid, window, scale, softcap, temperature=None):
    tiles = Tiles.of(q.shape, window, scale, softcap)
    batch, heads, group, tokens, dim = q.shape
    split = (batch, heads * tiles.splits, tiles.groups, tokens)
    lengths = valid.sum(-1, dtype=jnp.int32)
    out, lse = forward(tiles, q.reshape(*split, dim), k, v, lengths, temperature)
    return out.reshape(q.shape), lse.reshape(q.shape[:-1])


def forward(tiles: Tiles, q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array, temperature: jax.Array | None):
    batch, heads = q.shape[:2]
    major, minor = tiles.walk("query")

    def last(length, size):
        return jnp.maximum(length - 1, 0) // size

    def query_map(b, n, s, major, minor, lengths):
        return b, n, 0, jnp.minimum(major[s + 1], last(lengths[b], tiles.queries)), 0

    def out_map(b, n, s, major, minor, lengths):
        return b, n, 0, major[s + 1], 0

    def key_map(b, n, s, major, minor, lengths):
        return b, n // tiles.splits, jnp.minimum(minor[s], last(lengths[b], tiles.keys)), 0

    queries = (None, None, tiles.groups, tiles.queries, tiles.dim)
    keys = pl.BlockSpec((None, None, tiles.keys, tiles.dim), key_map)
    wide_scratch = [pltpu.VMEM((tiles.rows, LANES), jnp.float32)] * 2
    return pl.pallas_call(
        functools.partial(_kernel, tiles),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(batch, heads, len(minor)),
            in_specs=[pl.BlockSpec(queries, query_map), keys, keys],
            out_specs=[pl.BlockSpec(queries, out_map), pl.BlockSpec(queries[:-1], lambda *a: out_map(*a)[:-1])],
            scratch_shapes=[pltpu.VMEM((tiles.rows, tiles.dim), jnp.float32), *wide_scratch],
        ),
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct(q.shape[:-1], jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        name="prefill_attention",
    )(jnp.asarray(major), jnp.asarray(minor), lengths, q, k, v)


def _kernel(tiles, major, minor, lengths, q_ref, k_ref, v_ref, out_ref, lse_ref, acc, top, total):
    b, s = pl.program_id(0), pl.program_id(2)
    i, j, length = major[s + 1], minor[s], lengths[b]

    @pl.when(major[s] != i)
    def _():
        acc[...] = jnp.zeros_like(acc)
        top[...] = jnp.full_like(top, LOWEST)
        total[...] = jnp.zeros_like(total)

    def step(masked):
        q = q_ref[...].reshape(tiles.rows, tiles.dim)
        logits = dot(q, k_ref[...], transposed=True)
        if tiles.softcap is None:
            logits = logits * (tiles.scale * LOG2E)
        else:
            logits = jnp.tanh(logits * (tiles.scale / tiles.softcap)) * (tiles.softcap * LOG2E)
        values = v_ref[...]
        if masked:
            query, key = tiles.query_index(i, (tiles.rows, 1)), tiles.key_index(j, (1, tiles.keys))
            logits = jnp.where(tiles.sees(query, key, length), logits, -jnp.inf)
            values = jnp.where(tiles.key_index(j, (tiles.keys, 1)) < length, values, 0)
        old = top[...]
        new = jnp.maximum(old, jnp.max(logits, axis=1, keepdims=True))
        weights = jnp.exp2(logits - wide(new, tiles.keys))
        fade = jnp.exp2(old - new)
        top[...] = new
        total[...] = total[...] * fade + sum(weights[:, c : c + LANES] for c in range(0, tiles.keys, LANES))
        acc[...] = acc[...] * wide(fade, tiles.dim) + dot(weights.astype(values.dtype), values)

    live, edge = tiles.live(i, j, length), tiles.edge(i, j, length)
    pl.when(live & edge)(lambda: step(True))
    pl.when(live & ~edge)(lambda: step(False))

    @pl.when(major[s + 2] != i)
    def _():
        norm = jnp.sum(total[...], axis=1, keepdims=True)
        real = (tiles.query_index(i, (tiles.rows, 1)) < length) & (norm > 0)
        safe = jnp.where(real, norm, 1.0)
        out = jnp.where(real, acc[...] / safe, 0.0)
        out_ref[...] = out.astype(out_ref.dtype).reshape(out_ref.shape)
        to_rows(lse_ref, jnp.where(real, top[...] / LOG2E + jnp.log(safe), -jnp.inf))
