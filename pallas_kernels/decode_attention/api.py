"""The public op and the order in which its implementations are tried."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.decode_attention import reference, specs, xla
from pallas_kernels.dispatch import Implementation, Op
from pallas_kernels.loader import Loader

OP = Op(
    name="decode_attention",
    implementations=(Implementation("xla", xla.run), Implementation("reference", reference.run)),
    example=specs.SPECS[0].abstract,
)


def decode_attention(
    q: jax.Array,
    keys: Loader,
    values: Loader,
    *,
    valid: jax.Array,
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
    it. What lies in invalid slots, NaN included, changes nothing. Head axes of 1 are shared by all kv heads.

    Args:
      q: [B, K, R, H], rotated; R = G · T queries that read kv head k.
      keys: loader with slots [B, K or 1, n, ...].
      values: loader of as many slots; its block may differ from that of the keys.
      valid: bool [B, K or 1, S].
      positions: int32 [B, K or 1, S], original position of each slot; needed with a window.
      query_positions: int32 [B, R]; needed with a window.
      window: sliding window in tokens, or None.
      scale: multiplies q·k.
      softcap: logits become softcap * tanh(logits / softcap), or None.
      bias: f32 [B, K or 1, S] added to the capped logits (log N where a slot stands for N tokens), or None.
      return_logits: also return what the softmax was taken of.
      implementation: 'xla' or 'reference'; None picks.

    Returns:
      out f32 [B, K, R, H] and lse f32 [B, K, R]; a query that sees nothing gets out 0 and lse -inf. With
      `return_logits` also logits f32 [B, K, R, S] (scaled, capped, biased; -inf where not seen).

    Raises:
      ValueError: shapes do not agree, or a window comes without positions.
      NotImplementedError: the named implementation cannot do this.
    """
    _check(q, keys, values, valid, {"positions": positions, "bias": bias})
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
        valid=valid,
        positions=positions,
        query_positions=query_positions,
        window=window,
        scale=scale,
        softcap=softcap,
        bias=bias,
        return_logits=return_logits,
        implementation=implementation,
    )


def _check(q: jax.Array, keys: Loader, values: Loader, valid: jax.Array, slotwise: dict[str, Any]) -> None:
    if q.ndim != 4 or q.shape[-1] != keys.head_dim:
        raise ValueError(f"q must be [B, K, R, H] with H = {keys.head_dim} as the keys have; got {q.shape}")
    batch, heads = q.shape[:2]
    for name, loader in (("keys", keys), ("values", values)):
        for leaf in jax.tree.leaves(loader.slots):
            if leaf.shape[0] != batch or leaf.shape[1] not in (1, heads):
                raise ValueError(
                    f"slots of {name} must lead with [B, K or 1] = [{batch}, {heads} or 1]; got {leaf.shape}"
                )
        if loader.count != valid.shape[-1]:
            raise ValueError(f"{name} hold {loader.count} slots, but valid has {valid.shape[-1]}")
    for name, x in {"valid": valid, **slotwise}.items():
        if x is not None and (x.ndim != 3 or x.shape[0] != batch or x.shape[1] not in (1, heads)):
            raise ValueError(f"{name} must be [B, K or 1, S] = [{batch}, {heads} or 1, S]; got {x.shape}")
        if x is not None and x.shape[2] != valid.shape[2]:
            raise ValueError(f"{name} has {x.shape[2]} slots, valid has {valid.shape[2]}")
