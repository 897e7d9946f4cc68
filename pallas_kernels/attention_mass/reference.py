"""The definition of `attention_mass`: all probabilities at once."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.logits import cap, visible


def probabilities(
    q: jax.Array,
    k: jax.Array,
    lse: jax.Array,
    query_positions: jax.Array,
    key_positions: jax.Array,
    query_valid: jax.Array,
    key_valid: jax.Array,
    window: int | None,
    scale: float,
    softcap: float | None,
) -> jax.Array:
    """f32 [B, K, G, T, S]: exp(logit - lse), 0 where masked. Shapes as in `api.attention_mass`."""
    keys = jnp.where(key_valid[:, None, :, None], k.astype(jnp.float32), 0.0)
    queries = jnp.where(query_valid[:, None, None, :, None], q.astype(jnp.float32), 0.0)
    logits = cap(jnp.einsum("bkgth,bksh->bkgts", queries, keys) * scale, softcap)
    seen = visible(query_positions, key_positions, window) & query_valid[:, :, None] & key_valid[:, None, :]
    # A query that saw no key has lse = -inf, and none of its entries is seen.
    total = jnp.where(jnp.isneginf(lse) | jnp.isnan(lse), 0.0, lse)
    return jnp.where(seen[:, None, None], jnp.exp(logits - total[..., None]), 0.0)


def run(
    q: jax.Array,
    k: jax.Array,
    lse: jax.Array,
    *,
    query_positions: jax.Array,
    key_positions: jax.Array,
    query_valid: jax.Array,
    key_valid: jax.Array,
    window: int | None,
    scale: float,
    softcap: float | None,
    reduce: str,
) -> jax.Array:
    """See `api.attention_mass`."""
    p = probabilities(
        q, k, lse, query_positions, key_positions, query_valid, key_valid, window, scale, softcap
    )
    return getattr(p, reduce)(axis=2).sum(axis=2)
