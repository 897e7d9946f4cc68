"""The definition of `attention_mass`: all probabilities at once, then their sum."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.logits import cap, visible


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
    logits = jnp.einsum("bkgth,bksh->bkgts", q.astype(jnp.float32), k.astype(jnp.float32)) * scale
    mask = visible(query_positions, key_positions, window) & query_valid[:, :, None] & key_valid[:, None, :]
    mask = mask[:, None, None] & ~jnp.isneginf(lse)[..., None]
    probabilities = jnp.where(mask, jnp.exp(cap(logits, softcap) - lse[..., None]), 0.0)
    over_group = {"sum": jnp.sum, "mean": jnp.mean, "max": jnp.max}[reduce]
    return jnp.sum(over_group(probabilities, axis=2), axis=2)
