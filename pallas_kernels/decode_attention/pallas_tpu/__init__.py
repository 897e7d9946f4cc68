"""`decode_attention` for TPU in Pallas: blocked online softmax over stored numbers as they are.

A step of the kernel takes a block of slots of about eight heads, in phases, since one head at a time would wait for
its own latencies. Packed rows enter the matrix unit as they lie (`Rows`): queries are laid out block by block over the
parts of a row, so that unpacking is shifts and masks of whole words. Codes are multiplied as int8 where the unit can;
queries and softmax weights are sums of signed bytes (`unit`), which loses nothing against float32. Scales multiply
logits and weights, never codes.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.compat import TpuCore, tpu_core
from pallas_kernels.decode_attention import xla
from pallas_kernels.decode_attention.gradient import with_gradient_of
from pallas_kernels.decode_attention.pallas_tpu.call import Slots, call
from pallas_kernels.decode_attention.pallas_tpu.formats import reader
from pallas_kernels.decode_attention.pallas_tpu.plan import Plan
from pallas_kernels.decode_attention.pallas_tpu.schedule import schedule
from pallas_kernels.loader import Loader
from pallas_kernels.pages import Pages
from pallas_kernels.schedule import StaticSchedule


def forward(
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
    core: TpuCore | None = None,
) -> tuple[jax.Array, ...]:
    """See `api.decode_attention`; `core` None means the one that is traced for."""
    batch, heads, queries, _ = q.shape
    rows, extra = keys.to_core(q)
    if softcap is not None and not isinstance(extra, float):
        raise NotImplementedError("a soft cap of products that keys' offsets add to")
    count = keys.count if pages is None else pages.count
    full = jnp.full((batch, 1), count, jnp.int32)
    lengths = full if lengths is None else jnp.minimum(lengths, count)
    slots = Slots(count, lengths, valid, positions, query_positions, bias, pages)
    if _joint(keys.core, values.core, slots):
        rows = rows.reshape(_one_head(rows.shape))
        now = None if query_positions is None else jnp.tile(query_positions, (1, heads))
        slots = Slots(count, lengths, valid, positions, now, bias, pages)
    plan = make_plan(rows, keys.core, values.core, slots, window, scale, softcap, return_logits, core)
    out, lse, *logits = call(plan, rows, keys.core, values.core, slots)
    out, lse, *logits = (x.reshape(batch, heads, queries, *x.shape[3:]) for x in (out, lse, *logits))
    if not isinstance(extra, float):
        shift = jnp.asarray(extra * scale)
        lse, logits = lse + shift[..., 0], [x + shift for x in logits]
    return values.from_core(out, jnp.where(jnp.isneginf(lse), 0.0, 1.0)[..., None]), lse, *logits


run = with_gradient_of(xla.run)(forward)


def make_plan(
    q: Any,
    keys: Loader,
    values: Loader,
    slots: Slots,
    window: int | None,
    scale: float,
    softcap: float | None,
    return_logits: bool,
    core: TpuCore | None = None,
) -> Plan:
    """The static decisions for these operands on `core`; None: the one that is traced for."""
    core = core or tpu_core()
    return Plan.of(
        reader(keys, core.multiplies_int8),
        reader(values, core.multiplies_int8),
        q.shape,
        slots.count,
        core.vector_memory,
        None if slots.pages is None else slots.pages.size,
        scale=scale,
        softcap=softcap,
        bias=slots.bias is not None,
        window=window,
        logits=return_logits,
    )


def static_schedule(spec: Any, *, steps: int, copies: bool) -> StaticSchedule:
    """See `pallas_kernels.schedule`."""
    (q, keys, values), options = spec.abstract()
    if options["pages"] is not None:
        raise NotImplementedError("the block is that of slots in order")
    q = jax.eval_shape(lambda q, keys: keys.to_core(q)[0], q, keys)
    keys, values = keys.core, values.core
    lengths = options["lengths"] or jax.ShapeDtypeStruct((q.shape[0], 1), jnp.int32)
    masks = (options[name] for name in ("valid", "positions", "query_positions", "bias"))
    slots = Slots(keys.count, lengths, *masks)
    if _joint(keys, values, slots):
        q = jax.ShapeDtypeStruct(_one_head(q.shape), q.dtype)
    names = ("window", "scale", "softcap", "return_logits")
    plan = make_plan(q, keys, values, slots, *(options[name] for name in names))
    return schedule(plan, keys, values, steps, copies)


def _one_head(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of queries [B, K, R, H] when they are all those of one head."""
    batch, heads, queries, dim = shape
    return batch, 1, heads * queries, dim


def _joint(keys: Loader, values: Loader, slots: Slots) -> bool:
    """Whether all kv heads read the same slots, so that their queries are those of one head."""
    shared = all(x.shape[0] == 1 for x in jax.tree.leaves((keys.per_head, values.per_head)))
    arrays = [*jax.tree.leaves((keys.slots, values.slots)), slots.valid, slots.positions, slots.bias, slots.lengths]
    arrays.append(None if slots.pages is None else slots.pages.table)
    return shared and all(x is None or x.shape[1] == 1 for x in arrays)
