"""What tokens hide from all later queries (selective attention: Leviathan et al., 2024, arXiv 2410.02703), in a cache.

A cache keeps one number per token that a row has seen, by position: how much the logits of later queries are lowered at
that token, in all heads. Slots come and go; the number is found by the position of the slot's token.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kvjax.cache.prompt import selection
from kvjax.cache.step import Step
from kvjax.typing import Array
from pallas_kernels.lanes import CACHE_BYTES
from pallas_kernels.logits import visible


def at(hiding: Array, positions: Array) -> Array:
    """f32 [B, K or 1, S]: the numbers [B, max_length] of tokens at positions int32 [B, K or 1, S]; 0 in empty slots."""
    taken = jnp.take_along_axis(hiding[:, None], jnp.maximum(positions, 0), axis=2)
    return jnp.where(positions >= 0, taken, 0.0)


def of_prompt(step: Step) -> Array:
    """f32 [B, T]: by how much the logits of a query behind the last valid one are lowered at each token of a prompt."""
    queries, keys = (x[:, 0].astype(jnp.float32) for x in selection(step))
    batch, tokens, _ = queries.shape
    size = max(1, min(tokens, CACHE_BYTES // (4 * batch * tokens)))
    more = -tokens % size

    def cut(x: Array) -> Array:
        return jnp.moveaxis(
            jnp.pad(x, [(0, 0), (0, more), *[(0, 0)] * (x.ndim - 2)]).reshape(batch, -1, size, *x.shape[2:]), 1, 0
        )

    def add(total: Array, block: tuple[Array, Array, Array]) -> tuple[Array, None]:
        own, places, valid = block
        logits = jnp.einsum("bth,bsh->bts", own, keys) * step.scale
        sees = visible(places, step.positions, step.window) & (places[..., None] != step.positions[:, None])
        sees &= valid[..., None] & step.valid[:, None]
        return total + jnp.where(sees, jax.nn.relu(logits), 0.0).sum(1), None

    start = jnp.zeros((batch, tokens), jnp.float32)
    total, _ = jax.lax.scan(add, start, (cut(queries), cut(step.positions), cut(step.valid)))
    return total


def after(hiding: Array, step: Step, positions: Sequence[Array], logits: Sequence[Array | None]) -> Array:
    """The numbers after one more token, whose query of head 0 hides what it looks at.

    Args:
      step: of one token. positions: per segment int32 [B, K or 1, S]. logits: f32 [B, K, G, S], lowered already.
    """
    head = 0 if step.kv_head_of_query is None else step.kv_head_of_query[0]
    rows = jnp.arange(len(hiding))[:, None]
    lowered = [at(hiding, places) for places in positions]
    for places, own, less in zip(positions, logits, lowered, strict=True):
        assert own is not None
        mine = min(head, places.shape[1] - 1)
        place = places[:, mine]
        chosen = jax.nn.relu(own[:, head, 0] + less[:, mine])
        counted = (place > 0) & step.valid  # neither a row's first token nor an empty slot
        hiding = hiding.at[rows, jnp.where(counted, place, hiding.shape[1])].add(chosen, mode="drop")
    return hiding
