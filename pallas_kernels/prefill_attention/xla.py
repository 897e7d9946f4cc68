"""`prefill_attention` for XLA: blocks of queries against the causal prefix of the keys, with its own backward pass.

Queries are cut into at most `MAX_SPANS` spans. A span sees a static prefix of the keys, so that most of the masked
half of the T x T square is never computed; inside a span a loop visits blocks of queries. The backward pass keeps only
`out` and `lse` and recomputes the probabilities block by block (Dao et al., 2022, arXiv:2205.14135, section 3.1).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.lanes import CACHE_BYTES, over_lanes
from pallas_kernels.prefill_attention import selective
from pallas_kernels.prefill_attention.blocks import Plan, attend, finish, heated


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
    batch, heads, groups, tokens, _ = q.shape
    block = _query_block(groups, tokens)
    padded = -(-tokens // block) * block
    plan = Plan(padded, block, window, softcap)

    def prepare(x: jax.Array, factor: float = 1.0) -> jax.Array:
        """float32, zero where invalid (0 · NaN is NaN), padded to whole blocks, one lane per (row, head)."""
        mask = valid.reshape(batch, *(1,) * (x.ndim - 3), tokens, 1)
        x = jnp.where(mask, x.astype(jnp.float32) * factor, 0.0)
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, padded - tokens), (0, 0)])
        return jnp.broadcast_to(x, (batch, heads, *x.shape[2:])).reshape(batch * heads, *x.shape[2:])

    if temperature is not None:
        factors = temperature[:, None, None] if temperature.ndim == 2 else temperature
        temperature = prepare(jnp.broadcast_to(factors, q.shape[:4])[..., None])[..., 0]
    seen = jnp.repeat(jnp.pad(valid, [(0, 0), (0, padded - tokens)]), heads, axis=0)
    args = (prepare(q, scale), prepare(k), prepare(v), seen, temperature)
    results: Any
    if selection is None:
        results = _attend(plan, *args)  # pyright: ignore[reportGeneralTypeIssues]
    else:
        lane = jax.vmap(jax.checkpoint(partial(selective.lane, plan)))
        chooser = (prepare(selection[0], scale), prepare(selection[1]))
        results = over_lanes(lane, (*args, *chooser), _together(plan, groups + 1))
    out = results[0][:, :, :tokens].reshape(*q.shape[:4], v.shape[-1])
    lse = results[1][:, :, :tokens].reshape(q.shape[:4])
    if selection is None:
        return out.astype(q.dtype), lse
    hidden = results[2].reshape(batch, heads, padded)[:, : selection[0].shape[1], :tokens]
    return out.astype(q.dtype), lse, hidden


def _query_block(groups: int, tokens: int) -> int:
    """Queries whose logits against all keys fill a quarter of the cache, between 16 and 256, a power of two."""
    fit = CACHE_BYTES // (4 * 4 * groups * tokens)
    block = max(16, min(256, 1 << max(0, fit.bit_length() - 1)))
    return min(block, tokens)


def _together(plan: Plan, groups: int) -> int:
    """Lanes whose logits of one block fill half of the cache."""
    return CACHE_BYTES // (2 * 4 * groups * plan.block * plan.tokens)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    plan: Plan, q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array, temperature: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """q [lanes, G, T, H], k [lanes, T, H], v [lanes, T, H'], seen [lanes, T], temperature [lanes, G, T] or None.

    Returns out [lanes, G, T, H'], lse [lanes, G, T].
    """
    lane = jax.vmap(partial(_forward_lane, plan))
    return over_lanes(lane, (q, k, v, seen, temperature), _together(plan, q.shape[1]))


def _forward(plan: Plan, q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array, temperature: jax.Array | None):
    out, lse = _attend(plan, q, k, v, seen, temperature)  # pyright: ignore[reportGeneralTypeIssues]
    return (out, lse), (q, k, v, seen, temperature, out, lse)


def _backward(plan: Plan, saved: tuple[jax.Array, ...], cotangents: tuple[jax.Array, jax.Array]):
    lane = jax.vmap(partial(_backward_lane, plan))
    dq, dk, dv, dtemperature = over_lanes(lane, (*saved, *cotangents), _together(plan, saved[0].shape[1]))
    return dq, dk, dv, None, dtemperature


_attend.defvjp(_forward, _backward)


def _forward_lane(
    plan: Plan, q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array, temperature: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    outs, lses = [], []
    for start, end, first in plan.spans():
        keys, values, mask = k[first:end], v[first:end], seen[first:end]

        def block(args, keys=keys, values=values, mask=mask, first=first):
            queries, factors, first_query = args
            logits = heated(plan.capped(queries, keys), factors)
            return attend(jnp.where(plan.mask(mask, first_query, first), logits, -jnp.inf), values)

        cut = tuple(None if x is None else plan.split(x[:, start:end]) for x in (q, temperature))
        out, lse = jax.lax.map(block, (*cut, plan.starts(start, end)))
        outs.append(plan.join(out))
        lses.append(plan.join(lse))
    return finish(outs, lses, seen)


def _backward_lane(
    plan: Plan,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    seen: jax.Array,
    temperature: jax.Array | None,
    out: jax.Array,
    lse: jax.Array,
    dout: jax.Array,
    dlse: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    # d logit = p * (dout · v - dout · out + dlse); rows without a key have p = 0.
    empty = jnp.isneginf(lse)
    dout = jnp.where(empty[..., None], 0.0, dout)
    shift = jnp.where(empty, 0.0, dlse) - jnp.sum(dout * out, axis=-1)
    log_total = jnp.where(empty, jnp.inf, lse)
    dqs, dfactors, dk, dv = [], [], jnp.zeros_like(k), jnp.zeros_like(v)
    for start, end, first in plan.spans():
        keys, values, mask = k[first:end], v[first:end], seen[first:end]

        def block(carry, args, keys=keys, values=values, mask=mask, first=first):
            dkeys, dvalues = carry
            queries, factors, douts, shifts, log_totals, first_query = args
            capped = plan.capped(queries, keys)
            logits = jnp.where(plan.mask(mask, first_query, first), heated(capped, factors), -jnp.inf)
            weights = jnp.exp(logits - log_totals[..., None])
            dlogits = weights * (jnp.einsum("gth,sh->gts", douts, values) + shifts[..., None])
            dfactor = None if factors is None else jnp.sum(dlogits * capped, axis=-1)
            dlogits = heated(dlogits, factors)
            if plan.softcap is not None:
                dlogits *= 1.0 - jnp.square(capped / plan.softcap)
            dkeys += jnp.einsum("gts,gth->sh", dlogits, queries)
            dvalues += jnp.einsum("gts,gth->sh", weights, douts)
            return (dkeys, dvalues), (jnp.einsum("gts,sh->gth", dlogits, keys), dfactor)

        cut = tuple(
            None if x is None else plan.split(x[:, start:end]) for x in (q, temperature, dout, shift, log_total)
        )
        zeros = (jnp.zeros_like(keys), jnp.zeros_like(values))
        (dkeys, dvalues), (dq, dfactor) = jax.lax.scan(block, zeros, (*cut, plan.starts(start, end)))
        dqs.append(plan.join(dq))
        dfactors.append(None if dfactor is None else plan.join(dfactor))
        dk, dv = dk.at[first:end].add(dkeys), dv.at[first:end].add(dvalues)
    dtemperature = None if temperature is None else jnp.concatenate(dfactors, axis=1)
    return jnp.concatenate(dqs, axis=1), dk, dv, dtemperature
