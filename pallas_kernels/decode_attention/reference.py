"""The definition of `decode_attention`: decode everything, one softmax over all slots in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.loader import Loader
from pallas_kernels.logits import cap, finite_max, log_sum
from pallas_kernels.pages import Pages, valid_slots


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
    batch, heads, _, _ = q.shape
    slots = valid.shape[-1]
    k = jnp.broadcast_to(keys.decode(), (batch, heads, slots, keys.head_dim))
    v = jnp.broadcast_to(values.decode(), (batch, heads, slots, values.head_dim))
    seen = jnp.broadcast_to(valid, (batch, heads, slots))

    logits = cap(jnp.einsum("bkrh,bksh->bkrs", q, k) * scale, softcap)
    if bias is not None:
        logits = logits + bias[:, :, None]
    mask = seen[:, :, None]
    if window is not None:
        assert positions is not None and query_positions is not None
        mask = mask & (query_positions[:, None, :, None] - positions[:, :, None, :] < window)
    logits = jnp.where(mask, logits, -jnp.inf)

    top = finite_max(logits)
    weights = jnp.exp(logits - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = jnp.einsum("bkrs,bksh->bkrh", weights, jnp.where(seen[..., None], v, 0.0)) / jnp.where(total == 0, 1.0, total)
    lse = log_sum(total, top)[..., 0]
    return (out, lse, logits) if return_logits else (out, lse)
