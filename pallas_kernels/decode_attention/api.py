"""The public op and the order in which its implementations are tried."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.decode_attention import pallas_gpu, pallas_tpu, reference, specs, xla
from pallas_kernels.dispatch import Implementation, Op
from pallas_kernels.loader import Loader
from pallas_kernels.pages import Pages

OP = Op(
    name="decode_attention",
    implementations=(
        Implementation("pallas_tpu", pallas_tpu.run, platforms=("tpu",)),
        Implementation(
            "pallas_gpu", pallas_gpu.run, platforms=("gpu",), unproven="numerics unproven: never run on a device"
        ),
        Implementation("xla", xla.run),
        Implementation("reference", reference.run),
    ),
    example=specs.SPECS[0].abstract,
)


def decode_attention(
    q: jax.Array,
    keys: Loader,
    values: Loader,
    *,
    lengths: jax.Array | None = None,
    valid: jax.Array | None = None,
    pages: Pages | None = None,
    positions: jax.Array | None = None,
    query_positions: jax.Array | None = None,
    window: int | None = None,
    scale: float,
    softcap: float | None = None,
    bias: jax.Array | None = None,
    return_logits: bool = False,
    implementation: str | None = None,
) -> tuple[jax.Array, ...]:
    """Attention of R queries per kv head to S slots that all precede them; blocked, computed in float32.

    There is no causal mask: a query sees a slot that is valid and, with a window, less than `window` positions before
    it. What lies in invalid slots, NaN included, changes nothing. Head axes of 1 are shared by all kv heads. Slots are
    valid where both `lengths` and `valid` say so; `lengths` alone is the cheapest.

    Gradients with respect to q and to the floating leaves of `keys` and `values` are those of the definition.

    Args:
      q: [B, K, R, H], rotated; R = G · T queries that read kv head k.
      keys: loader with slots [B, K or 1, n, ...].
      values: loader of as many slots; its block may differ from that of the keys.
      lengths: int32 [B] or [B, K or 1]; slots from there on are not valid. None: no such limit.
      valid: bool [B, K or 1, S]. None: no holes.
      pages: read slots through a page table: then slots of `keys` and `values` lead with [B or 1, K or 1, n], and S is
        `pages.count` everywhere else. None: slots lie in order.
      positions: int32 [B, K or 1, S], original position of each slot; needed with a window.
      query_positions: int32 [B, R]; needed with a window.
      window: sliding window in tokens, or None.
      scale: multiplies q·k.
      softcap: logits become softcap * tanh(logits / softcap), or None.
      bias: f32 [B, K or 1, S] added to the capped logits (log N where a slot stands for N tokens), or None.
      return_logits: also return what the softmax was taken of.
      implementation: 'pallas_tpu', 'pallas_gpu', 'xla' or 'reference'; None picks.

    Returns:
      out f32 [B, K, R, H] and lse f32 [B, K, R]; a query that sees nothing gets out 0 and lse -inf. With
      `return_logits` also logits f32 [B, K, R, S] (scaled, capped, biased; -inf where not seen).

    Raises:
      ValueError: shapes do not agree, or a window comes without positions.
      NotImplementedError: the named implementation cannot do this.
    """
    slots = keys.count if pages is None else pages.count
    if lengths is not None and lengths.ndim == 1:
        lengths = lengths[:, None]
    _check_loaders(q, keys, values, pages)
    check_slotwise(q, slots, {"valid": valid, "positions": positions, "bias": bias})
    if lengths is not None and lengths.shape not in {(q.shape[0], 1), q.shape[:2]}:
        raise ValueError(f"lengths must be [B] or [B, K or 1] with [B, K] = {q.shape[:2]}; got {lengths.shape}")
    if window is not None and (positions is None or query_positions is None):
        raise ValueError("a window needs positions [B, K or 1, S] and query_positions [B, R]")
    if query_positions is not None and query_positions.shape != (q.shape[0], q.shape[2]):
        raise ValueError(f"query_positions must be [B, R] = {(q.shape[0], q.shape[2])}; got {query_positions.shape}")
    if window is None:
        positions = query_positions = None
    return OP(
        q.astype(jnp.float32),
        keys,
        values,
        lengths=lengths,
        valid=valid,
        pages=pages,
        positions=positions,
        query_positions=query_positions,
        window=window,
        scale=scale,
        softcap=softcap,
        bias=bias,
        return_logits=return_logits,
        implementation=implementation,
    )


def _check_loaders(q: jax.Array, keys: Loader, values: Loader, pages: Pages | None) -> None:
    if q.ndim != 4 or q.shape[-1] != keys.head_dim:
        raise ValueError(f"q must be [B, K, R, H] with H = {keys.head_dim} as the keys have; got {q.shape}")
    batch, heads = q.shape[:2]
    rows = (batch,) if pages is None else (1, batch)
    for name, loader in (("keys", keys), ("values", values)):
        for leaf in jax.tree.leaves(loader.slots):
            if leaf.shape[0] not in rows or leaf.shape[1] not in (1, heads):
                form = "[B, K or 1]" if pages is None else "[B or 1, K or 1]"
                raise ValueError(
                    f"slots of {name} must lead with {form} where [B, K] = {[batch, heads]}; got {leaf.shape}"
                )
    if keys.count != values.count:
        raise ValueError(f"keys hold {keys.count} slots, but values hold {values.count}")
    if pages is None:
        return
    if pages.table.ndim != 3 or pages.table.shape[0] != batch or pages.table.shape[1] not in (1, heads):
        raise ValueError(f"a page table must be [B, K or 1, n] = [{batch}, {heads} or 1, n]; got {pages.table.shape}")
    for name, loader in (("keys", keys), ("values", values)):
        piece = loader.block * loader.granularity
        if pages.size % piece or loader.count % pages.size:
            raise ValueError(
                f"pages of {pages.size} slots do not fit {name}: {loader.count} slots that can be cut at multiples of "
                f"{piece}"
            )


def check_slotwise(q: jax.Array, slots: int, arrays: dict[str, Any]) -> None:
    """Raises ValueError where an array is not [B, K or 1, S]."""
    batch, heads = q.shape[:2]
    for name, x in arrays.items():
        if x is not None and (x.ndim != 3 or x.shape[0] != batch or x.shape[1] not in (1, heads)):
            raise ValueError(f"{name} must be [B, K or 1, S] = [{batch}, {heads} or 1, S]; got {x.shape}")
        if x is not None and x.shape[2] != slots:
            raise ValueError(f"{name} has {x.shape[2]} slots, keys and values have {slots}")
