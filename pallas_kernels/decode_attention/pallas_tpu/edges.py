"""What the kernel does before the first block and after the last one, for all heads of a step at once."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.decode_attention.pallas_tpu.lanes import lane, placement, wide
from pallas_kernels.decode_attention.pallas_tpu.plan import LOG2E, Plan
from pallas_kernels.decode_attention.pallas_tpu.unit import dot, query_terms
from pallas_kernels.rows import LANES

LOWEST = -1e30
"""Where a running maximum starts: finite, so that exp2(masked - maximum) is exp2(-inf), never exp2(-inf + inf)."""


def start(plan: Plan, q_ref: Any, at: dict[str, Any]) -> None:
    """Empties the running softmax and lays out the queries."""
    at["top"][...] = jnp.full(at["top"].shape, LOWEST, jnp.float32)
    for name in ("total", "out", "out_summand"):
        if name in at:
            at[name][...] = jnp.zeros(at[name].shape, jnp.float32)
    heads, keys = len(plan.heads), plan.keys
    factor = plan.scale * (LOG2E if plan.softcap is None else 1.0 / plan.softcap)
    q = q_ref[...].reshape(heads, plan.queries, keys.dim) * factor
    terms, scale = query_terms(q, keys.unit)
    if "query_scale" in at:
        at["query_scale"][...] = jnp.broadcast_to(scale[:, 0], (heads, LANES))
    if "query_sum" in at:
        _store_sums(plan, q.reshape(-1, keys.dim), at["query_sum"])
    rows = jnp.concatenate([x.reshape(-1, keys.dim) for x in terms], axis=0)
    for plane in range(keys.planes):
        placed = rows
        if keys.planes * keys.fold > 1:
            exact = jnp.float32 if keys.unit == jnp.float32 else jnp.bfloat16
            place = placement(keys.dim, plane, keys.fold, keys.width).astype(exact)
            placed = dot(rows.astype(exact), place)
        if keys.unit == jnp.int8:
            placed = placed.astype(jnp.int32)
        for number in range(heads):
            _store_plane(plan, placed, plane, number, at["query"])


def _store_sums(plan: Plan, q: jax.Array, ref: Any) -> None:
    """The sum of every query's channels in each group of channels, in the rows of the logits."""
    size = plan.keys.dim // plan.keys.groups
    for c in range(plan.keys.groups):
        own = q if plan.keys.groups == 1 else jnp.where(lane(q.shape) // size == c, q, 0.0)
        total = jnp.broadcast_to(jnp.sum(own, axis=1, keepdims=True), (q.shape[0], LANES))
        for g in range(plan.groups):
            members = [_head(plan, total, g * plan.group + a) for a in range(plan.group)]
            ref[g, c] = jnp.concatenate([x for x in members for _ in range(plan.fold)], axis=0)


def _store_plane(plan: Plan, placed: jax.Array, plane: int, number: int, ref: Any) -> None:
    """Rows (term, head, part, query) of one head's lanes: its queries in the lanes of a row's part, 0 elsewhere."""
    keys, heads = plan.keys, len(plan.heads)
    g, a = divmod(number, plan.group)
    start = (a * keys.planes + plane) * keys.padded
    shape = (plan.queries, keys.lanes)
    empty = jnp.zeros((keys.fold * plan.queries, keys.lanes), placed.dtype)
    for c in range(max(1, keys.groups)):
        pieces = []
        for t in range(placed.shape[0] // (heads * plan.queries)):
            own = _head(plan, placed, t * heads + number)
            if keys.groups > 1:
                own = jnp.where(keys.group_of_lane(plane, plan.queries) == c, own, jnp.zeros_like(own))
            part = lane(shape) // keys.width
            parts = (
                [jnp.where(part == j, own, jnp.zeros_like(own)) for j in range(keys.fold)] if keys.fold > 1 else [own]
            )
            pieces += [x for owner in range(plan.group) for x in (parts if owner == a else [empty])]
        ref[g, c, :, start : start + keys.lanes] = jnp.concatenate(pieces, axis=0).astype(keys.unit)


def finish(plan: Plan, at: dict[str, Any], out_ref: Any, lse_ref: Any) -> None:
    """Joins the parts of each head and writes the results."""
    heads, values = len(plan.heads), plan.values
    tops, fades = zip(*(_joined_tops(plan, at["top"], number) for number in range(heads)), strict=True)

    def joined(read: Any) -> jax.Array:
        """[heads · queries, n]: what `read(g, rows, part)` gives, faded to the head's maximum, added over parts."""
        found = []
        for number in range(heads):
            g, parts = _parts(plan, number)
            pieces = [read(g, rows, j) for j, rows in enumerate(parts)]
            scaled = [x * wide(fade, x.shape[1]) for x, fade in zip(pieces, fades[number], strict=True)]
            found.append(sum(scaled[1:], start=scaled[0]))
        return jnp.concatenate(found, axis=0)

    total = jnp.sum(joined(lambda g, rows, j: at["total"][g, rows]), axis=1, keepdims=True)
    out: Any = 0.0
    for plane in range(values.planes):

        def own(g: int, rows: slice, j: int, plane: int = plane) -> jax.Array:
            a = rows.start // (plan.fold * plan.queries)
            first = (a * values.planes + plane) * values.padded
            x = at["out"][g, rows, first : first + values.lanes]
            return x if plan.fold == 1 else jnp.where(lane(x.shape) // values.width == j, x, 0.0)

        x = joined(own)
        if values.planes * values.fold > 1:
            place = placement(values.dim, plane, values.fold, values.width).astype(jnp.float32)
            x = dot(x, place, transposed=True)
        out = out + x
    for c in range(values.groups if values.has_summand else 0):
        more = joined(lambda g, rows, j, c=c: at["out_summand"][g, c, rows])
        more = jnp.sum(more, axis=1, keepdims=True)
        out = out + jnp.where(lane(out.shape) // (values.dim // values.groups) == c, more, 0.0)
    empty = total == 0.0
    safe = jnp.where(empty, 1.0, total)
    out = out / safe
    lse = jnp.where(empty, -jnp.inf, jnp.concatenate(tops, axis=0) / LOG2E + jnp.log(safe))
    for number, (row, head) in enumerate(plan.heads):
        out_ref[row, head] = _head(plan, out, number)[: out_ref.shape[2]]
    lse = jnp.pad(lse, ((0, -lse.shape[0] % LANES), (0, 0)))
    line = jnp.concatenate([lse[i : i + LANES].T[:1] for i in range(0, lse.shape[0], LANES)], axis=1)
    lse_ref[0, 0] = line[:, : lse_ref.shape[3]]


def _joined_tops(plan: Plan, ref: Any, number: int) -> tuple[jax.Array, list[jax.Array]]:
    """A head's maximum [R, 128], and by how much each part fades to it."""
    g, parts = _parts(plan, number)
    tops = [ref[g, rows] for rows in parts]
    top = tops[0]
    for x in tops[1:]:
        top = jnp.maximum(top, x)
    return top, [jnp.exp2(x - top) for x in tops]


def _parts(plan: Plan, number: int) -> tuple[int, list[slice]]:
    """The group of a head, and which of its rows are each part's."""
    g, a = divmod(number, plan.group)
    first = a * plan.fold * plan.queries
    return g, [slice(first + j * plan.queries, first + (j + 1) * plan.queries) for j in range(plan.fold)]


def _head(plan: Plan, x: jax.Array, number: int) -> jax.Array:
    """The rows of a head in [heads · queries, n]."""
    return x[number * plan.queries : (number + 1) * plan.queries]
