"""A decoded token that reads all keys, and the values of few slots (`Selector.values`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import jax
import jax.numpy as jnp

from kvjax.cache.policy import Tokens
from kvjax.cache.prompt import logits_of
from kvjax.cache.segment import Segment
from kvjax.typing import Array

if TYPE_CHECKING:
    from kvjax.cache.layer_cache import LayerCache


def loads_few_values(cache: LayerCache, tokens: Tokens) -> bool:
    """Whether these tokens read the values of some slots only: a decoded one, where there are more than it may read."""
    few = cache.method.selector.values
    if few is None or not tokens.decoding or tokens.valid.shape[1] > 1:
        return False
    return few < 1 + sum(segment.slots for segment in _segments(cache))


def read_few_values(
    cache: LayerCache,
    tokens: Tokens,
    queries: Array,
    own_keys: Array,
    places: Sequence[Array | None],
) -> tuple[Array, Array, list[Array]]:
    """Attends one token to the cache and to itself.

    Args:
      queries: [B, K, G, 1, H], own_keys: [B, K, 1, H], rotated. places: of each segment, see `Segment.attend`.

    Returns:
      out f32 [B, K, G, H']; the log-sum-exp of all slots f32 [B, K, G]; the logits f32 [B, K, G, S] of each segment.
    """
    step, rows = tokens.step, queries[:, :, :, 0]
    at = jnp.tile(step.positions, (1, rows.shape[2]))
    segments = _segments(cache)
    logits = [segment.logits(rows, step, place, at) for segment, place in zip(segments, places, strict=True)]
    own = logits_of(step, queries, own_keys)[..., 0]
    own = jnp.where(step.valid[:, None, None], own, -jnp.inf)
    everything = jnp.concatenate([*logits, own], axis=-1)
    slots, weights = cache.method.selector.weigh(everything)
    # The token itself is the last slot. What it is not weighed for must not count, though it be no number.
    of_itself = jnp.where(slots == everything.shape[-1] - 1, weights, 0.0).sum(-1, keepdims=True)
    out = jnp.where(of_itself > 0, of_itself * tokens.values[:, :, None, 0].astype(jnp.float32), 0.0)
    start = 0
    for segment in segments:
        out = out + segment.mix(slots - start, weights)
        start += segment.slots
    return out, jax.nn.logsumexp(everything, axis=-1), logits


def _segments(cache: LayerCache) -> tuple[Segment, ...]:
    """Those of the cache, none of which is a pool: `kvjax.cache.refusal` sees to that."""
    return cast(tuple[Segment, ...], cache.segments)
