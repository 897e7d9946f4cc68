"""What the kernel reads beside the slots, made by XLA before it, and the result, put together after it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.decode_attention.pallas_gpu.keys import keys_of
from pallas_kernels.decode_attention.pallas_gpu.plan import SLOTS, Plan, Stored
from pallas_kernels.logits import log_sum
from pallas_kernels.pages import Pages


@dataclasses.dataclass(frozen=True)
class Slots:
    """What belongs to slots beside their keys and values.

    Attributes:
      valid: bool [B, K or 1, S].
      bias: f32 [B, K or 1, S] or None.
      positions: int32 [B, K or 1, S]; with a window.
      oldest: int32 [B, R], the first position that each query sees; with a window.
      pages: where the slots lie, or None.
    """

    valid: jax.Array
    bias: jax.Array | None
    positions: jax.Array | None
    oldest: jax.Array | None
    pages: Pages | None


def inputs(plan: Plan, q: jax.Array, keys: Any, values: Any, slots: Slots) -> dict[str, Any]:
    """The kernel's arrays by name.

    Args:
      plan: static decisions.
      q: f32 [B, K, R, H], scaled.
      keys, values: loaders that the plan is made for.
      slots: what else there is of each slot.
    """
    padding = plan.queries - q.shape[2]
    arrays = keys_of(plan).inputs(jnp.pad(q, [(0, 0), (0, 0), (0, padding), (0, 0)]))
    arrays |= _slots("keys", keys, plan.keys) | _slots("values", values, plan.values)
    bias = 0.0 if slots.bias is None else slots.bias
    arrays["added"] = jnp.where(slots.valid, bias, -jnp.inf).astype(jnp.float32)
    seen = slots.valid
    if plan.window:
        assert slots.positions is not None and slots.oldest is not None
        oldest = jnp.pad(slots.oldest, [(0, 0), (0, padding)], mode="edge")
        arrays |= {"positions": slots.positions, "oldest": oldest}
        seen = seen & (slots.positions >= jnp.min(oldest, axis=1)[:, None, None])
    if slots.pages is not None:
        arrays["table"] = jnp.clip(slots.pages.table, 0, keys.count // slots.pages.size - 1)
    arrays["ranges"] = _ranges(seen)
    return arrays


def _slots(side: str, loader: Any, stored: Stored) -> dict[str, jax.Array]:
    if not stored.packed:
        return {side: loader.x}
    affine = dict(zip(stored.affine, loader.scale + (loader.zero or ()), strict=True))
    return {side: loader.codes.data} | {f"{side}_{name}": x for name, x in affine.items()}


def _ranges(seen: jax.Array) -> jax.Array:
    """int32 [B, K or 1, 2]: the tiles from the first to behind the last that holds a slot to be seen."""
    tile = jnp.arange(seen.shape[-1], dtype=jnp.int32) // SLOTS
    end = jnp.max(jnp.where(seen, tile + 1, 0), axis=-1)
    begin = jnp.min(jnp.where(seen, tile, end[..., None]), axis=-1)
    return jnp.stack([begin, end], axis=-1)


def result(plan: Plan, sums: jax.Array, statistics: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of all blocks: sums of values f32 [B, K, R, H], total weights f32 [B, K, R, 1] and lse f32 [B, K, R]."""
    tops = statistics[:, :, :, 0]
    top = jnp.max(tops, axis=2, keepdims=True)
    top = jnp.where(jnp.isneginf(top), 0.0, top)
    share = jnp.exp(tops - top)
    statistics = jnp.einsum("bksr,bksir->bkir", share, statistics[:, :, :, 1:])
    sums = jnp.einsum("bksr,bksicr->bkicr", share, sums)

    channel = range(plan.values.head_dim)
    which = jnp.asarray([plan.sums.index((c // 64, c // plan.values.group)) for c in channel])
    out = sums[:, :, which, jnp.asarray(channel) % 64]
    if plan.values.packed:
        out = _shifted(plan.values, out, statistics[:, :, 1:])
    total = statistics[:, :, 0]
    return jnp.swapaxes(out, -1, -2), total[..., None], log_sum(total, top[:, :, 0])


def _shifted(stored: Stored, sums: jax.Array, affine: jax.Array) -> jax.Array:
    """Sums of values [..., H, R] from those of decoded bytes and the totals of scales and zeros [..., C or 2 C, R]."""
    scales, zeros = affine[..., : stored.groups, :], affine[..., stored.groups :, :]
    if not stored.has_zero:
        zeros = scales * stored.symmetric_zero
    group = jnp.arange(stored.head_dim) // stored.group
    offset, unit = stored.offset()[:, None], stored.unit()[:, None]
    return (sums + offset * scales[..., group, :]) / unit + zeros[..., group, :]
