"""`prefill_attention` for XLA: blocks of queries against the causal prefix of the keys, with its own backward pass.

Queries are cut into at most `MAX_SPANS` spans. A span sees a static prefix of the keys, so that most of the masked
half of the T x T square is never computed; inside a span a loop visits blocks of queries. The backward pass keeps only
`out` and `lse` and recomputes the probabilities block by block (Dao et al., 2022, arXiv:2205.14135, section 3.1).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.lanes import CACHE_BYTES, over_lanes
from pallas_kernels.logits import finite_max, log_sum, visible

MAX_SPANS = 4
"""Every span is compiled. Four compute 5/8 of the square; eight compute 9/16 of it and compile 1.5 times as long."""


@dataclasses.dataclass(frozen=True)
class _Plan:
    """How T queries are cut, and the static parameters of a logit. `tokens` is a multiple of `block`."""

    tokens: int
    block: int
    window: int | None
    softcap: float | None

    def spans(self) -> Iterator[tuple[int, int, int]]:
        """(first query, one past the last query, first key that any of them sees)."""
        blocks = self.tokens // self.block
        width = -(-blocks // MAX_SPANS) * self.block
        for start in range(0, self.tokens, width):
            first_key = 0 if self.window is None else max(0, start - self.window + 1)
            yield start, min(self.tokens, start + width), first_key


def run(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    valid: jax.Array,
    window: int | None,
    scale: float,
    softcap: float | None,
) -> tuple[jax.Array, jax.Array]:
    """See `api.prefill_attention`."""
    batch, heads, groups, tokens, dim = q.shape
    block = _query_block(groups, tokens)
    padded = -(-tokens // block) * block
    plan = _Plan(padded, block, window, softcap)

    def prepare(x: jax.Array, factor: float = 1.0) -> jax.Array:
        """float32, zero where invalid (0 · NaN is NaN), padded to whole blocks, one lane per (row, head)."""
        mask = valid.reshape(batch, *(1,) * (x.ndim - 3), tokens, 1)
        x = jnp.where(mask, x.astype(jnp.float32) * factor, 0.0)
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, padded - tokens), (0, 0)])
        return x.reshape(batch * heads, *x.shape[2:])

    seen = jnp.repeat(jnp.pad(valid, [(0, 0), (0, padded - tokens)]), heads, axis=0)
    out, lse = _attend(plan, prepare(q, scale), prepare(k), prepare(v), seen)  # pyright: ignore[reportGeneralTypeIssues]
    out = out[:, :, :tokens].reshape(batch, heads, groups, tokens, dim)
    lse = lse[:, :, :tokens].reshape(batch, heads, groups, tokens)
    return out.astype(q.dtype), lse


def _query_block(groups: int, tokens: int) -> int:
    """Queries whose logits against all keys fill a quarter of the cache, between 16 and 256, a power of two."""
    fit = CACHE_BYTES // (4 * 4 * groups * tokens)
    block = max(16, min(256, 1 << max(0, fit.bit_length() - 1)))
    return min(block, tokens)


def _together(plan: _Plan, groups: int) -> int:
    """Lanes whose logits of one block fill half of the cache."""
    return CACHE_BYTES // (2 * 4 * groups * plan.block * plan.tokens)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: _Plan, q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array) -> tuple[jax.Array, jax.Array]:
    """q [lanes, G, T, H], k and v [lanes, T, H], seen [lanes, T] -> out [lanes, G, T, H], lse [lanes, G, T]."""
    return over_lanes(jax.vmap(partial(_forward_lane, plan)), (q, k, v, seen), _together(plan, q.shape[1]))


def _forward(plan: _Plan, q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array):
    out, lse = _attend(plan, q, k, v, seen)  # pyright: ignore[reportGeneralTypeIssues]
    return (out, lse), (q, k, v, seen, out, lse)


def _backward(plan: _Plan, saved: tuple[jax.Array, ...], cotangents: tuple[jax.Array, jax.Array]):
    args = (*saved, *cotangents)
    dq, dk, dv = over_lanes(jax.vmap(partial(_backward_lane, plan)), args, _together(plan, saved[0].shape[1]))
    return dq, dk, dv, None


_attend.defvjp(_forward, _backward)


def _split(x: jax.Array, plan: _Plan) -> jax.Array:
    """[G, n * block, ...] -> [n, G, block, ...]."""
    groups, length, *rest = x.shape
    return jnp.moveaxis(x.reshape(groups, length // plan.block, plan.block, *rest), 1, 0)


def _join(x: jax.Array) -> jax.Array:
    """Inverse of `_split`."""
    count, groups, block, *rest = x.shape
    return jnp.moveaxis(x, 0, 1).reshape(groups, count * block, *rest)


def _starts(start: int, end: int, plan: _Plan) -> jax.Array:
    return jnp.arange(start, end, plan.block)


def _logits(
    plan: _Plan, q: jax.Array, k: jax.Array, seen: jax.Array, first_query: jax.Array, first_key: int
) -> jax.Array:
    """Capped logits [G, block, S] of one block of queries; -inf where masked."""
    logits = jnp.einsum("gth,sh->gts", q, k)
    if plan.softcap is not None:
        logits = plan.softcap * jnp.tanh(logits / plan.softcap)
    query_positions = first_query + jnp.arange(plan.block)
    key_positions = first_key + jnp.arange(k.shape[0])
    mask = visible(query_positions, key_positions, plan.window) & seen
    return jnp.where(mask, logits, -jnp.inf)


def _forward_lane(
    plan: _Plan, q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array
) -> tuple[jax.Array, jax.Array]:
    outs, lses = [], []
    for start, end, first in plan.spans():
        keys, values, mask = k[first:end], v[first:end], seen[first:end]

        def block(args, keys=keys, values=values, mask=mask, first=first):
            queries, first_query = args
            logits = _logits(plan, queries, keys, mask, first_query, first)
            top = finite_max(logits)
            weights = jnp.exp(logits - top)
            total = jnp.sum(weights, axis=-1, keepdims=True)
            out = jnp.einsum("gts,sh->gth", weights, values) / jnp.where(total == 0, 1.0, total)
            return out, log_sum(total, top)[..., 0]

        out, lse = jax.lax.map(block, (_split(q[:, start:end], plan), _starts(start, end, plan)))
        outs.append(_join(out))
        lses.append(_join(lse))
    out, lse = jnp.concatenate(outs, axis=1), jnp.concatenate(lses, axis=1)
    # A padded query still sees the keys before it; what it computes is no result.
    return jnp.where(seen[:, None], out, 0.0), jnp.where(seen, lse, -jnp.inf)


def _backward_lane(
    plan: _Plan,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    seen: jax.Array,
    out: jax.Array,
    lse: jax.Array,
    dout: jax.Array,
    dlse: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    # d logit = p * (dout · v - dout · out + dlse); rows without a key have p = 0.
    empty = jnp.isneginf(lse)
    dout = jnp.where(empty[..., None], 0.0, dout)
    shift = jnp.where(empty, 0.0, dlse) - jnp.sum(dout * out, axis=-1)
    log_total = jnp.where(empty, jnp.inf, lse)
    dqs, dk, dv = [], jnp.zeros_like(k), jnp.zeros_like(v)
    for start, end, first in plan.spans():
        keys, values, mask = k[first:end], v[first:end], seen[first:end]

        def block(carry, args, keys=keys, values=values, mask=mask, first=first):
            dkeys, dvalues = carry
            first_query, queries, douts, shifts, log_totals = args
            logits = _logits(plan, queries, keys, mask, first_query, first)
            weights = jnp.exp(logits - log_totals[..., None])
            dlogits = weights * (jnp.einsum("gth,sh->gts", douts, values) + shifts[..., None])
            if plan.softcap is not None:
                capped = jnp.where(jnp.isneginf(logits), 0.0, logits)
                dlogits *= 1.0 - jnp.square(capped / plan.softcap)
            dkeys += jnp.einsum("gts,gth->sh", dlogits, queries)
            dvalues += jnp.einsum("gts,gth->sh", weights, douts)
            return (dkeys, dvalues), jnp.einsum("gts,sh->gth", dlogits, keys)

        args = tuple(_split(x[:, start:end], plan) for x in (q, dout, shift, log_total))
        zeros = (jnp.zeros_like(keys), jnp.zeros_like(values))
        (dkeys, dvalues), dq = jax.lax.scan(block, zeros, (_starts(start, end, plan), *args))
        dqs.append(_join(dq))
        dk, dv = dk.at[first:end].add(dkeys), dv.at[first:end].add(dvalues)
    return jnp.concatenate(dqs, axis=1), dk, dv
