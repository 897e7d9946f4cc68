"""The XLA form of `prefill_attention` with `selection`: blocks of queries in order, each after what others have hidden.

One row of T numbers carries from block to block what all earlier queries have hidden. The backward pass needs that row
at every block; it is recomputed from checkpoints at two levels, so that 2 sqrt(n) rows are held for n blocks, not n.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.lanes import divisor_at_most
from pallas_kernels.prefill_attention.blocks import Plan, attend, finish, heated


def lane(
    plan: Plan,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    seen: jax.Array,
    temperature: jax.Array | None,
    chooser_q: jax.Array,
    chooser_k: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One (row, kv head), all float32 and zero where padded.

    Args:
      q: [G, T, H], scaled. k, v: [T, H]. seen: bool [T]. temperature: [G, T] or None.
      chooser_q, chooser_k: [T, C], chooser_q scaled.

    Returns:
      out [G, T, H], lse [G, T], hidden [T].
    """
    hidden = jnp.zeros_like(chooser_k[:, 0])
    outs, lses = [], []
    for start, end, first in plan.spans():
        keys, values, mask, chooser_keys = k[first:end], v[first:end], seen[first:end], chooser_k[first:end]

        def block(hidden, args, keys=keys, values=values, mask=mask, first=first, chooser_keys=chooser_keys):
            queries, factors, chooser, first_query = args
            sees = plan.mask(mask, first_query, first)
            chosen = _chosen(plan, chooser[0], chooser_keys, sees, first_query, first)
            # Earlier rows of the block hide from later ones; a product with a triangle is the exclusive running sum.
            within = jnp.tril(jnp.ones((plan.block, plan.block)), -1) @ chosen
            logits = heated(plan.capped(queries, keys), factors) - (hidden + within)
            return hidden + jnp.sum(chosen, axis=0), attend(jnp.where(sees, logits, -jnp.inf), values)

        cut = tuple(None if x is None else plan.split(x[:, start:end]) for x in (q, temperature, chooser_q[None]))
        span, (out, lse) = _scan(block, hidden[first:end], (*cut, plan.starts(start, end)))
        hidden = hidden.at[first:end].set(span)
        outs.append(plan.join(out))
        lses.append(plan.join(lse))
    return *finish(outs, lses, seen), hidden


def _chosen(
    plan: Plan, queries: jax.Array, keys: jax.Array, sees: jax.Array, first_query: jax.Array, first_key: int
) -> jax.Array:
    """How strongly each query of a block hides each key before it, a padded query (of zeros) none: f32 [block, S]."""
    before = (first_query + jnp.arange(plan.block))[:, None] > first_key + jnp.arange(keys.shape[0])
    return jnp.where(sees & before, jax.nn.relu(queries @ keys.T), 0.0)


def _scan(step: Callable[..., Any], carry: jax.Array, xs: Any) -> tuple[jax.Array, Any]:
    """`jax.lax.scan` that keeps O(sqrt(n)) carries for the backward pass."""
    count = jax.tree.leaves(xs)[0].shape[0]
    root = math.isqrt(count)
    inner = divisor_at_most(count, root)
    if 2 * inner < root:
        inner = root  # and a rest, for which the step is compiled once more

    def several(carry: jax.Array, xs: Any) -> tuple[jax.Array, Any]:
        return jax.lax.scan(jax.checkpoint(step), carry, xs)

    rest = count % inner
    folded = jax.tree.map(lambda x: x[: count - rest].reshape(-1, inner, *x.shape[1:]), xs)
    carry, ys = jax.lax.scan(jax.checkpoint(several), carry, folded)
    ys = jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:]), ys)
    if rest:
        carry, more = several(carry, jax.tree.map(lambda x: x[count - rest :], xs))
        ys = jax.tree.map(lambda *parts: jnp.concatenate(parts), ys, more)
    return carry, ys
