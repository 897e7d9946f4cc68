"""`decode_attention` for XLA: a few heads at a time, an online softmax over chunks of slots.

XLA on a CPU decodes into memory before it multiplies, so what is decoded at once must fit the cache: heads are visited
in lanes and slots in chunks, and the decoded chunk never leaves the second-level cache. Formats that need no decoding
are read where they lie, all heads at once. Online softmax: Milakov and Gimelshein, 2018, arXiv:1805.02867.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.lanes import over_lanes
from pallas_kernels.loader import Loader, PyTree
from pallas_kernels.logits import cap

CHUNK_BYTES = 1 << 18
"""Decoded keys (or values) that are alive at once on a CPU, and the limit of their logits."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Slots:
    """Everything that has a slot axis. Keys and values lead with [lanes, heads, M], the rest is [lanes, heads, S]."""

    keys: PyTree
    values: PyTree
    valid: jax.Array
    positions: jax.Array | None
    bias: jax.Array | None


@dataclasses.dataclass(frozen=True)
class _Problem:
    """The formats and the static parameters of a logit."""

    keys: Loader
    values: Loader
    window: int | None
    softcap: float | None
    return_logits: bool


def run(
    q: jax.Array,
    keys: Loader,
    values: Loader,
    *,
    valid: jax.Array,
    positions: jax.Array | None,
    query_positions: jax.Array | None,
    window: int | None,
    scale: float,
    softcap: float | None,
    bias: jax.Array | None,
    return_logits: bool,
) -> tuple[jax.Array, ...]:
    """See `api.decode_attention`."""
    batch, heads, rows, _ = q.shape
    problem = _Problem(keys, values, window, softcap, return_logits)
    slots = _Slots(keys.slots, values.slots, valid, positions, bias)
    q, query_positions, slots = _lanes(q * scale, query_positions, slots)
    chunk, together = _sizes(problem, q.shape, valid.shape[-1])
    results = over_lanes(
        lambda q, at, slots: _attend(problem, chunk, q, at, slots), (q, query_positions, slots), together
    )
    return tuple(x.reshape(batch, heads, rows, *x.shape[3:]) for x in results)


def _lanes(
    q: jax.Array, query_positions: jax.Array | None, slots: _Slots
) -> tuple[jax.Array, jax.Array | None, _Slots]:
    """Arranges the problem as [lanes, heads, ...] with as little as possible in the heads axis.

    Nothing is shared by heads: each (row, head) is a lane. All is shared: heads become further queries of a row.
    Some is: lanes are rows, and what is shared keeps a head axis of 1.
    """
    batch, heads, rows, dim = q.shape
    shared = {leaf.shape[1] == 1 for leaf in jax.tree.leaves((slots.keys, slots.values))}
    masks = {leaf.shape[1] == 1 for leaf in (slots.valid, slots.positions, slots.bias) if leaf is not None}
    at = None if query_positions is None else query_positions[:, None]
    if shared | masks == {True}:
        at = None if at is None else jnp.tile(at, (1, 1, heads))
        return q.reshape(batch, 1, heads * rows, dim), at, slots
    if shared != {False}:
        return q, at, slots

    def split(x: jax.Array) -> jax.Array:
        x = jnp.broadcast_to(x, (batch, heads, *x.shape[2:]))
        return x.reshape(batch * heads, 1, *x.shape[2:])

    return split(q), jax.tree.map(split, at), jax.tree.map(split, slots)


def _sizes(problem: _Problem, shape: tuple[int, ...], slots: int) -> tuple[int, int]:
    """(slots per chunk, lanes at once)."""
    lanes, heads, rows, _ = shape
    dim = max(problem.keys.head_dim, problem.values.head_dim)
    in_place = problem.keys.reads_in_place and problem.values.reads_in_place
    if in_place and rows <= dim // 2:  # logits are small beside what is read: nothing to save
        return slots, lanes
    slot_bytes = 4 * heads * max(rows, 0 if in_place else dim)
    step = math.lcm(problem.keys.block, problem.values.block)
    chunk = max(1, CHUNK_BYTES // (slot_bytes * step)) * step
    if chunk >= slots:
        return slots, max(1, CHUNK_BYTES // (slot_bytes * slots))
    return chunk, 1


def _attend(
    problem: _Problem, chunk: int, q: jax.Array, query_positions: jax.Array | None, slots: _Slots
) -> tuple[jax.Array, ...]:
    """Some lanes: q [lanes, heads, R, H] -> out, lse[, logits], all slots in chunks."""
    total = slots.valid.shape[-1]
    whole = total // chunk

    def step(carry: tuple[jax.Array, ...], part: _Slots) -> tuple[tuple[jax.Array, ...], jax.Array | None]:
        logits = _logits(problem, q, query_positions, part)
        carry = _accumulate(carry, logits, problem.values.with_slots(part.values), part.valid)
        return carry, logits if problem.return_logits else None

    def cut(start: Any, length: int) -> _Slots:
        def blocks(x: jax.Array, size: int) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(x, start // size, length // size, axis=2)

        return _Slots(
            keys=jax.tree.map(lambda x: blocks(x, problem.keys.block), slots.keys),
            values=jax.tree.map(lambda x: blocks(x, problem.values.block), slots.values),
            **{
                name: None if (x := getattr(slots, name)) is None else blocks(x, 1)
                for name in ("valid", "positions", "bias")
            },
        )

    lead = q.shape[:3]
    carry = (
        jnp.full((*lead, 1), -jnp.inf),
        jnp.zeros((*lead, 1)),
        jnp.zeros((*lead, problem.values.head_dim)),
    )
    pieces = []
    if whole == 1:
        carry, logits = step(carry, cut(0, chunk))
        pieces.append(logits)
    else:
        carry, stacked = jax.lax.scan(lambda c, i: step(c, cut(i * chunk, chunk)), carry, jnp.arange(whole))
        if problem.return_logits:
            pieces.append(jnp.moveaxis(stacked, 0, 3).reshape(*lead, whole * chunk))
    if total % chunk:
        carry, logits = step(carry, cut(whole * chunk, total % chunk))
        pieces.append(logits)

    top, weight, mixed = carry
    empty = weight == 0
    safe = jnp.where(empty, 1.0, weight)
    out, lse = mixed / safe, jnp.where(empty, -jnp.inf, jnp.log(safe) + top)[..., 0]
    return (out, lse, jnp.concatenate(pieces, axis=-1)) if problem.return_logits else (out, lse)


def _logits(problem: _Problem, q: jax.Array, query_positions: jax.Array | None, part: _Slots) -> jax.Array:
    """f32 [lanes, heads, R, S]; -inf where not seen."""
    logits = cap(problem.keys.with_slots(part.keys).dot(q), problem.softcap)
    if part.bias is not None:
        logits = logits + part.bias[..., None, :]
    mask = part.valid[..., None, :]
    if problem.window is not None:
        assert part.positions is not None and query_positions is not None
        mask = mask & (query_positions[..., None] - part.positions[..., None, :] < problem.window)
    return jnp.where(mask, logits, -jnp.inf)


def _accumulate(
    carry: tuple[jax.Array, ...], logits: jax.Array, values: Loader, valid: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One step of the online softmax over (maximum, sum of weights, weighted sum of values)."""
    top, weight, mixed = carry
    new_top = jnp.maximum(top, jnp.max(logits, axis=-1, keepdims=True))
    shift = jnp.where(jnp.isneginf(new_top), 0.0, new_top)
    weights = jnp.exp(logits - shift)
    decay = jnp.exp(top - shift)
    weight = weight * decay + jnp.sum(weights, axis=-1, keepdims=True)
    return new_top, weight, mixed * decay + values.mix(weights, valid)
