"""Attention that reads all keys and few values, in two halves: logits of all slots, and values of those chosen.

Between the two a caller chooses. XLA computes both on every platform, in the blocks of `decode_attention`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.decode_attention import xla
from pallas_kernels.decode_attention.api import check_slotwise
from pallas_kernels.loader import Loader
from pallas_kernels.rows import Rows, each


def decode_logits(
    q: jax.Array,
    keys: Loader,
    *,
    valid: jax.Array,
    positions: jax.Array | None = None,
    query_positions: jax.Array | None = None,
    window: int | None = None,
    scale: float,
    softcap: float | None = None,
    bias: jax.Array | None = None,
) -> jax.Array:
    """What `decode_attention` returns as logits, without reading values: f32 [B, K, R, S], -inf where not seen.

    Arguments are those of `decode_attention`.

    Raises:
      ValueError: shapes do not agree, or a window comes without positions.
    """
    check_slotwise(q, keys.count, {"valid": valid, "positions": positions, "bias": bias})
    if window is not None and (positions is None or query_positions is None):
        raise ValueError("a window needs positions [B, K or 1, S] and query_positions [B, R]")
    return xla.seen_logits(
        q.astype(jnp.float32) * scale,
        keys,
        valid=valid,
        positions=positions,
        query_positions=query_positions,
        window=window,
        softcap=softcap,
        bias=bias,
    )


def mix_slots(values: Loader, slots: jax.Array, weights: jax.Array) -> jax.Array:
    """A few slots of each query, summed: f32 [B, K, R, H].

    Stored codes are gathered first and decoded then, so no more than the chosen slots is ever decoded.

    Args:
      values: loader of S slots, [B, K or 1, S, ...], whose block is one slot.
      slots: int32 [B, K, R, C], from 0 to S - 1, others for each query.
      weights: f32 [B, K, R, C]. What lies in a slot of weight 0, NaN included, adds nothing.

    Raises:
      ValueError: the values are stored in blocks of several slots.
    """
    if values.block > 1:
        raise ValueError(f"values are stored in blocks of {values.block} slots, of which none can be read by itself")
    core = values.core
    batch, heads, rows, count = slots.shape
    taken = _take(core, slots.reshape(batch, heads, rows * count)).decode().reshape(*slots.shape, -1)
    taken = jnp.where((weights != 0)[..., None], taken, 0.0)
    sums = jnp.einsum("bkrc,bkrch->bkrh", weights, taken, precision="highest")
    return values.from_core(sums, jnp.sum(weights, axis=-1, keepdims=True))


def _take(loader: Loader, slot: jax.Array) -> Loader:
    """A loader of copies of the slots int32 [B, K, n], in this order: its leaves lead with [B, K, n]."""

    def leaf(x: Rows | jax.Array) -> Rows | jax.Array:
        shared = (x.data if isinstance(x, Rows) else x).shape[1] == 1  # by all heads
        at = slot.reshape(slot.shape[0], 1, -1) if shared else slot
        if isinstance(x, Rows):
            return Rows(x.take(at).reshape(*slot.shape, x.width), x.width)
        at = at.reshape(*at.shape, *(1,) * (x.ndim - 3))
        return jnp.take_along_axis(x, at, axis=2, mode="clip").reshape(*slot.shape, *x.shape[3:])

    return loader.with_slots(each(leaf, loader.slots))
