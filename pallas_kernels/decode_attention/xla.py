"""`decode_attention` for XLA: logits of all slots, one softmax, weighted values; decoding a chunk at a time.

XLA on a CPU decodes into memory before it multiplies, so what is decoded at once must fit the cache: heads are visited
in lanes and slots in chunks, and a decoded chunk never leaves the second-level cache. Formats that need no decoding
are read where they lie, all heads at once. A row of logits is small beside the slots that it is read from, so it is
kept whole; many queries are taken a few at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.lanes import divisor_at_most
from pallas_kernels.loader import Loader
from pallas_kernels.logits import cap, finite_max, log_sum
from pallas_kernels.pages import Pages, valid_slots

LOGIT_BYTES = 1 << 23
"""Logits that are alive at once, unless those of `MIN_ROWS` queries are more."""

MIN_ROWS = 16

CPU_CHUNK_BYTES = 1 << 18
"""Decoded slots that are alive at once on a CPU: an eighth of a common second-level cache."""

ACCELERATOR_CHUNK_BYTES = 1 << 24
"""The same for all lanes together on an accelerator: a third of an H100's second-level cache."""

ACCELERATOR_SHARE = 8
"""On an accelerator one part in so many at most is decoded at once, or `ACCELERATOR_LEAST_BYTES` if that is more."""

ACCELERATOR_LEAST_BYTES = 1 << 20
"""To start a kernel takes as long as to read about so much."""


def run(
    q: jax.Array,
    keys: Loader,
    values: Loader,
    *,
    lengths: jax.Array | None = None,
    valid: jax.Array | None = None,
    pages: Pages | None = None,
    positions: jax.Array | None,
    query_positions: jax.Array | None,
    window: int | None,
    scale: float,
    softcap: float | None,
    bias: jax.Array | None,
    return_logits: bool,
) -> tuple[jax.Array, ...]:
    """See `api.decode_attention`."""
    if pages is not None:
        keys, values = pages.gather(keys), pages.gather(values)
    valid = valid_slots(q.shape[0], keys.count, lengths, valid)

    def attend(q: jax.Array, query_positions: jax.Array | None) -> tuple[jax.Array, ...]:
        logits = seen_logits(
            q,
            keys,
            valid=valid,
            positions=positions,
            query_positions=query_positions,
            window=window,
            softcap=softcap,
            bias=bias,
        )
        top = finite_max(logits)
        weights = jnp.exp(logits - top)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        out = _mix(values, weights, valid) / jnp.where(total == 0, 1.0, total)
        lse = log_sum(total, top)[..., 0]
        return (out, lse, logits) if return_logits else (out, lse)

    return _by_rows(attend, q * scale, query_positions, valid.shape[-1])


def seen_logits(
    q: jax.Array,
    keys: Loader,
    *,
    valid: jax.Array,
    positions: jax.Array | None,
    query_positions: jax.Array | None,
    window: int | None,
    softcap: float | None,
    bias: jax.Array | None,
) -> jax.Array:
    """f32 [B, K, R, S]: logits of scaled q [B, K, R, H], -inf where a slot is not seen."""
    logits = cap(_dot(keys, q), softcap)
    if bias is not None:
        logits = logits + bias[:, :, None]
    mask = valid[:, :, None]
    if window is not None:
        assert positions is not None and query_positions is not None
        mask = mask & (query_positions[:, None, :, None] - positions[:, :, None] < window)
    return jnp.where(mask, logits, -jnp.inf)


def _by_rows(
    attend: Callable[..., tuple[jax.Array, ...]], q: jax.Array, query_positions: jax.Array | None, slots: int
) -> tuple[jax.Array, ...]:
    """`attend(q, query_positions)` for a limited number of rows [B, K, R, H] at a time."""
    batch, heads, rows, dim = q.shape
    limit = max(MIN_ROWS, LOGIT_BYTES // (4 * batch * heads * slots))
    if rows <= limit:
        return attend(q, query_positions)
    passes = -(-rows // limit)
    each = -(-rows // passes)
    padding = passes * each - rows
    q = jnp.pad(q, [(0, 0), (0, 0), (0, padding), (0, 0)]).reshape(batch, heads, passes, each, dim)
    if query_positions is not None:
        query_positions = jnp.pad(query_positions, [(0, 0), (0, padding)]).reshape(batch, passes, each)
        query_positions = jnp.moveaxis(query_positions, 1, 0)
    parts = jax.lax.map(lambda part: attend(*part), (jnp.moveaxis(q, 2, 0), query_positions))

    def join(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x, 0, 2).reshape(batch, heads, passes * each, *x.shape[4:])[:, :, :rows]

    return tuple(join(x) for x in parts)


def _dot(loader: Loader, q: jax.Array) -> jax.Array:
    """f32 [B, K, R, S]: inner products of q [B, K, R, H] with all slots."""
    queries, bias = loader.to_core(q)
    lanes, loader, rows = _arrange(loader.core, queries)
    if _in_place(loader):
        logits = loader.dot(rows)
    else:
        logits = _by_chunk(loader, lanes, rows, lambda part, own, at: part.dot(own), _concatenated)
    return logits.reshape(*q.shape[:3], -1) + bias


def _mix(loader: Loader, weights: jax.Array, valid: jax.Array) -> jax.Array:
    """f32 [B, K, R, H]: all slots summed with weights [B, K, R, S]; valid is bool [B, K or 1, S]."""
    core = loader.core
    lanes, arranged, rows = _arrange(core, weights)

    def masked() -> jax.Array:
        # Arranged anew: XLA gives what enters a branch a layout of its own, and would copy the arranged slots.
        _, arranged, rows = _arrange(core, weights)
        seen = _arrange_valid(valid, weights.shape[1], lanes)
        return _by_chunk(arranged, lanes, (rows, seen), lambda part, own, at: part.mix(at(own[0]), at(own[1])), _summed)

    if _in_place(core):
        # Leaving slots out costs a copy of all values. It matters only where an invalid slot holds a NaN or an
        # infinity, and then the plain sum shows it, because 0 times either is NaN.
        plain = arranged.mix(rows, None)
        out = jax.lax.cond(jnp.all(jnp.isfinite(plain)), lambda: plain, masked)
    else:
        out = masked()
    return loader.from_core(out.reshape(*weights.shape[:3], -1), jnp.sum(weights, axis=-1, keepdims=True))


def _in_place(loader: Loader) -> bool:
    """Whether slots are read where they lie. Not in a dtype that is widened: XLA on a CPU would widen all at once."""
    return loader.reads_in_place and not any(_is_narrow(leaf) for leaf in jax.tree.leaves(loader.slots))


def _arrange(loader: Loader, rows: jax.Array) -> tuple[tuple[int, ...], Loader, jax.Array]:
    """The problem in lanes: their shape, the loader's slots [*lanes, n, ...] and `rows` [B, K, R, ...] in that form.

    Nothing is shared by heads: each (row, head) is a lane. Everything is: rows are lanes, and the heads' queries
    become queries of one head. Something is, or heads have leaves of their own (`per_head`): (B, K), and what is shared
    keeps a head axis of 1. Elsewhere there is no axis of size 1, because XLA may choose another layout around one and
    then copies.
    """
    batch, heads = rows.shape[:2]
    shared = {leaf.shape[1] == 1 for leaf in jax.tree.leaves(loader.slots)}
    if len(shared) == 2 or any(leaf.shape[0] > 1 for leaf in jax.tree.leaves(loader.per_head)):
        return (batch, heads), loader, rows
    lanes = (batch,) if shared == {True} else (batch * heads,)
    slots = jax.tree.map(lambda x: x.reshape(*lanes, *x.shape[2:]), loader.slots)
    return lanes, loader.with_slots(slots), rows.reshape(*lanes, -1, rows.shape[-1])


def _arrange_valid(valid: jax.Array, heads: int, lanes: tuple[int, ...]) -> jax.Array:
    """bool [*lanes, S] from [B, K or 1, S]."""
    batch, _, slots = valid.shape
    if lanes == (batch,):  # one store for all heads: a slot that any of them sees holds a token
        return jnp.any(valid, axis=1)
    return jnp.broadcast_to(valid, (batch, heads, slots)).reshape(*lanes, slots)


def _by_chunk(
    loader: Loader,
    lanes: tuple[int, ...],
    own: Any,
    read: Callable[..., jax.Array],
    join: Callable[..., jax.Array],
) -> jax.Array:
    """Reads the slots of some lanes, a chunk at a time, and goes on to the next lanes.

    Args:
      loader: slots [*lanes, n, ...].
      lanes: the shape of the lanes; the first axis is the one that is walked.
      own: pytree of what each lane needs beside its slots, leaves [*lanes, ...].
      read: (loader of one chunk, `own` of its lanes, function that cuts the chunk out of a last axis S) -> array.
      join: makes one array of what `read` gives for the chunks.
    """
    axis = len(lanes)
    blocks = loader.count // loader.block
    block_elements = math.prod(lanes[1:]) * loader.block * loader.head_dim
    elements = lanes[0] * blocks * block_elements
    together, chunk = _sizes(lanes[0], blocks, 4 * block_elements, loader.granularity)
    large = jax.tree.map(lambda x: _is_narrow(x) and 8 * x.size > elements, loader.slots)
    # What is small, like scales, is widened before the loop: to slice bits takes longer than to decode what they scale.
    loader = loader.with_slots(jax.tree.map(lambda x, large: x if large else _widened(x), loader.slots, large))

    def visit(first: Any) -> jax.Array:
        mine = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, first, together), own)

        def piece(start: Any, size: int) -> jax.Array:
            def cut(x: jax.Array, large: bool) -> jax.Array:
                entries = x.shape[axis]  # one per slot, per block, or per row of several slots
                begin = (first, *(0,) * (axis - 1), start * entries // blocks, *(0,) * (x.ndim - axis - 1))
                sizes = (together, *x.shape[1:axis], size * entries // blocks, *x.shape[axis + 1 :])
                return _widened(_slice_bits(x, begin, sizes)) if large else jax.lax.dynamic_slice(x, begin, sizes)

            def at(x: jax.Array) -> jax.Array:
                return jax.lax.dynamic_slice_in_dim(x, start * loader.block, size * loader.block, axis=-1)

            return read(loader.with_slots(jax.tree.map(cut, loader.slots, large)), mine, at)

        return join(piece, blocks, chunk)

    if together == lanes[0]:
        return visit(0)
    out = jax.lax.map(visit, jnp.arange(0, lanes[0], together))
    return out.reshape(lanes[0], *out.shape[2:])


def _is_narrow(x: jax.Array) -> bool:
    """Whether `x` has a floating dtype in which this platform does not compute: one of 16 or 8 bits on a CPU."""
    return jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize <= 2 and jax.default_backend() == "cpu"


def _widened(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32) if _is_narrow(x) else x


def _slice_bits(x: jax.Array, begin: tuple[Any, ...], sizes: tuple[int, ...]) -> jax.Array:
    """`dynamic_slice` of a narrow floating dtype that widens nothing.

    XLA on a CPU counts a slice as arithmetic and would widen all of `x` before the loop. It leaves a slice of bits
    alone. The barrier keeps the view as bits inside the loop; outside it would be a copy.
    """
    if sizes == x.shape:
        return x
    x, begin = jax.lax.optimization_barrier((x, begin))
    bits = jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16}[x.dtype.itemsize])
    return jax.lax.bitcast_convert_type(jax.lax.dynamic_slice(bits, begin, sizes), x.dtype)


def _sizes(lanes: int, blocks: int, block_bytes: int, granularity: int) -> tuple[int, int]:
    """(lanes at once, blocks per chunk, a multiple of `granularity`) whose decoded slots fit the platform's chunk."""
    on_cpu = jax.default_backend() == "cpu"
    share = max(lanes * blocks * block_bytes // ACCELERATOR_SHARE, ACCELERATOR_LEAST_BYTES)
    room = (CPU_CHUNK_BYTES if on_cpu else min(ACCELERATOR_CHUNK_BYTES, share) // lanes) // block_bytes
    chunk = max(1, min(blocks, room) // granularity) * granularity
    return divisor_at_most(lanes, room // blocks) if on_cpu else lanes, chunk


def _concatenated(piece: Callable[[Any, int], jax.Array], total: int, chunk: int) -> jax.Array:
    """[..., S] from pieces [..., size]."""
    whole, rest = divmod(total, chunk)
    if whole == 1:
        parts = [piece(0, chunk)]
    else:
        stacked = jax.lax.map(lambda start: piece(start, chunk), jnp.arange(whole) * chunk)
        parts = [jnp.moveaxis(stacked, 0, -2).reshape(*stacked.shape[1:-1], -1)]
    if rest:
        parts.append(piece(whole * chunk, rest))
    return jnp.concatenate(parts, axis=-1)


def _summed(piece: Callable[[Any, int], jax.Array], total: int, chunk: int) -> jax.Array:
    """The sum of all pieces, which have one shape."""
    whole, rest = divmod(total, chunk)
    # Pieces start the sum, not zeros: inside `shard_map` it must vary over the mesh like what is added in the loop.
    out = piece(0, chunk)
    if rest:
        out = out + piece(total - rest, rest)
    return jax.lax.fori_loop(1, whole, lambda i, total: total + piece(i * chunk, chunk), out) if whole > 1 else out
