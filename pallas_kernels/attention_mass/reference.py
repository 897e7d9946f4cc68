"""The definition of `attention_mass`: all probabilities at once, then their sum or maximum."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.attention_mass.noise import GumbelNoise
from pallas_kernels.logits import cap, visible


def run(
    q: jax.Array,
    k: jax.Array,
    lse: jax.Array | None,
    *,
    query_positions: jax.Array,
    key_positions: jax.Array,
    query_valid: jax.Array,
    key_valid: jax.Array,
    window: int | None,
    scale: float,
    softcap: float | None,
    temperature: jax.Array | None = None,
    noise: GumbelNoise | None = None,
    reduce: str,
    over: str = "sum",
    return_lse: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """See `api.attention_mass`."""
    logits = cap(jnp.einsum("bkgth,bksh->bkgts", q.astype(jnp.float32), k.astype(jnp.float32)) * scale, softcap)
    if noise is not None:
        logits += noise.at(query_positions, key_positions, q.shape[2])
    if temperature is not None:
        logits *= (temperature[:, None, None] if temperature.ndim == 2 else temperature)[..., None]
    mask = visible(query_positions, key_positions, window) & query_valid[:, :, None] & key_valid[:, None, :]
    logits = jnp.where(mask[:, None, None], logits, -jnp.inf)
    if lse is None:
        lse = jax.nn.logsumexp(logits, axis=-1)
    safe = jnp.where(jnp.isneginf(lse), jnp.inf, lse)
    probabilities = jnp.where(mask[:, None, None], jnp.exp(logits - safe[..., None]), 0.0)
    over_group = {"sum": jnp.sum, "mean": jnp.mean, "max": jnp.max}[reduce]
    over_queries = {"sum": jnp.sum, "max": jnp.max}[over]
    mass = over_queries(over_group(probabilities, axis=2), axis=2)
    return (mass, lse) if return_lse else mass
