"""What tokens hide from all later queries (selective attention: Leviathan et al., 2024, arXiv 2410.02703), in a cache.

A cache keeps one number per token that a row has seen, by position: how much the logits of later queries are lowered at
that token, in all heads. Slots come and go; the number is found by the position of the slot's token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from kvjax.cache.prompt import hiding_head, selection
from kvjax.cache.step import Step
from kvjax.errors import UsageError
from kvjax.typing import Array
from pallas_kernels.lanes import CACHE_BYTES
from pallas_kernels.logits import visible


def check(step: Step, hiding: Array | None) -> None:
    """Raises UsageError where a step hides tokens and its cache has no place for that, or the other way round."""
    if step.selective == (hiding is not None):
        return
    raise UsageError(
        f"a step with selective={step.selective} does not go with a cache that was made for "
        f"{'plain' if step.selective else 'selective'} attention. Make it with CacheDims(selective={step.selective})."
    )


def at(hiding: Array, positions: Array) -> Array:
    """f32 [B, K or 1, S]: the numbers [B, max_length] of tokens at positions int32 [B, K or 1, S]; 0 in empty slots."""
    taken = jnp.take_along_axis(hiding[:, None], jnp.maximum(positions, 0), axis=2)
    return jnp.where(positions >= 0, taken, 0.0)


def of_prompt(step: Step) -> Array:
    """f32 [B, T]: by how much the logits of a query behind the last valid one are lowered at each token of a prompt."""
    return over_prompt(step, lambda hidden, sees: None)[0]


def over_prompt(step: Step, look: Callable[[Array, Array], Array | None]) -> tuple[Array, Array | None]:
    """`of_prompt`, and what `look` makes of the numbers that each query meets; differentiable, in blocks of queries.

    Args:
      look: (f32 [B, n, T], by how much each of n queries' logits are lowered; bool [B, n, T], which tokens they see) to
        an array [B, n], or None.

    Returns:
      f32 [B, T], and what was looked at, [B, T] or None.
    """
    exists = step.valid[..., None]
    queries, keys = (jnp.where(exists, x[:, 0].astype(jnp.float32), 0.0) for x in selection(step))
    batch, tokens, _ = queries.shape
    size = max(1, min(tokens, CACHE_BYTES // (4 * batch * tokens)))
    more = -tokens % size

    def cut(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, more), *[(0, 0)] * (x.ndim - 2)])
        return jnp.moveaxis(x.reshape(batch, -1, size, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def add(hidden: Array, block: tuple[Array, Array, Array]) -> tuple[Array, Array | None]:
        own, places, valid = block
        logits = jnp.einsum("bth,bsh->bts", own, keys) * step.scale
        sees = visible(places, step.positions, step.window) & valid[..., None] & step.valid[:, None]
        before = sees & (places[..., None] != step.positions[:, None])
        chosen = jnp.where(before, jax.nn.relu(logits), 0.0)
        met = hidden[:, None] + jnp.cumsum(chosen, axis=1) - chosen
        return hidden + chosen.sum(1), look(met, sees)

    start = jnp.zeros((batch, tokens), jnp.float32)
    hidden, seen = jax.lax.scan(add, start, (cut(queries), cut(step.positions), cut(step.valid)))
    return hidden, None if seen is None else jnp.moveaxis(seen, 0, 1).reshape(batch, -1)[:, :tokens]


def after(hiding: Array, step: Step, positions: Sequence[Array], logits: Sequence[Array | None]) -> Array:
    """The numbers after one more token, whose query of head 0 hides what it looks at.

    Args:
      step: of one token. positions: per segment int32 [B, K or 1, S]. logits: f32 [B, K, G, S], lowered already.
    """
    head = hiding_head(step)
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
