"""The definition of `prefill_attention`: one T x T softmax in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.logits import cap, finite_max, log_sum, visible


def run(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    valid: jax.Array,
    window: int | None,
    scale: float,
    softcap: float | None,
    temperature: jax.Array | None = None,
    selection: tuple[jax.Array, jax.Array] | None = None,
) -> tuple[jax.Array, ...]:
    """See `api.prefill_attention`."""
    seen = valid[:, None, :, None]
    queries = jnp.where(seen[:, :, None], q.astype(jnp.float32), 0.0)
    keys = jnp.where(seen, k.astype(jnp.float32), 0.0)
    values = jnp.where(seen, v.astype(jnp.float32), 0.0)

    index = jnp.arange(q.shape[3])
    mask = visible(index, index, window) & valid[:, :, None] & valid[:, None, :]
    logits = cap(jnp.einsum("bkgth,bksh->bkgts", queries, keys) * scale, softcap)
    if temperature is not None:
        factor = temperature[:, None, None] if temperature.ndim == 2 else temperature
        logits *= jnp.where(valid[:, None, None], factor, 1.0)[..., None]
    hidden = ()
    if selection is not None:
        chosen = _chosen(*selection, seen, mask, scale)
        logits -= (jnp.cumsum(chosen, axis=2) - chosen)[:, :, None]
        hidden = (jnp.sum(chosen, axis=2),)
    logits = jnp.where(mask[:, None, None], logits, -jnp.inf)

    top = jax.lax.stop_gradient(finite_max(logits))
    weights = jnp.exp(logits - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = jnp.einsum("bkgts,bksh->bkgth", weights, values) / jnp.where(total == 0, 1.0, total)
    return out.astype(q.dtype), log_sum(total, top)[..., 0], *hidden


def _chosen(queries: jax.Array, keys: jax.Array, seen: jax.Array, mask: jax.Array, scale: float) -> jax.Array:
    """How strongly each query asks to hide each key before it from the queries after it: f32 [B, J, T, T]."""
    queries, keys = (jnp.where(seen, x.astype(jnp.float32), 0.0) for x in (queries, keys))
    logits = jnp.einsum("bjth,bjsh->bjts", queries, keys) * scale
    return jnp.where(jnp.tril(mask, -1)[:, None], jax.nn.relu(logits), 0.0)
