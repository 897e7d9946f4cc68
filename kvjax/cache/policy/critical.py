"""Keep what would change the layer's output most."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from kvjax.cache.policy.seen import Prompt, Slots, Tokens, ranks
from kvjax.cache.policy.wrapper import Wrapper
from kvjax.cache.prompt import group, group_filled
from kvjax.cache.step import Step
from kvjax.errors import UsageError
from kvjax.typing import Array

BLOCK_ELEMENTS = 1 << 20  # of a projection that exists at a time


@dataclasses.dataclass(frozen=True)
class Critical(Wrapper):
    """CriticalKV (Feng et al., 2025, arXiv 2502.03805): two stages around a score s that is not negative.

    The first `share` of the places goes to the best by s, the others to the best by (s + epsilon) · |W_O v|_1, the
    mean over the query heads of a kv head of what the value adds to the layer's output.

    Attributes:
      share: of the places, for the first stage. 0.5 in the paper.
      epsilon: 1e-4 in the release.
    """

    share: float = 0.5
    epsilon: float = 1e-4

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1 or self.epsilon < 0:
            raise UsageError(f"Critical needs a share in [0, 1] and epsilon >= 0; got {self.share} and {self.epsilon}")

    @property
    def per_head(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return True  # the second stage is

    @property
    def online(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return False  # two stages fill all places at once

    def prompt_scores(self, prompt: Prompt) -> Array:
        scores = self.inner.prompt_scores(prompt)
        rank = ranks(jnp.where(prompt.competing, -scores, jnp.inf))
        first = (prompt.places * jnp.float32(self.share) + 1e-4).astype(jnp.int32)
        weighted = (scores + self.epsilon) * projected_norms(prompt)
        return jnp.where(rank < first[:, None, None], jnp.finfo(jnp.float32).max, weighted)

    def slot_scores(self, slots: Slots) -> Array:
        raise UsageError("CriticalKV shares out all places of a prompt at once; decoded tokens do not compete")


def projected_norms(tokens: Tokens) -> Array:
    """f32 [B, K, T]: |W_O v|_1, the mean over the query heads that read a kv head.

    Raises:
      UsageError: the step has no output projection, or its head map is data.
    """
    step = tokens.step
    if step.output_projection is None:
        raise UsageError("CriticalKV needs the output projection: pass it to `attend`, or as Step.output_projection")
    if step.head_map is not None:
        raise UsageError("CriticalKV needs to know which query heads read a kv head, and here the map is data")
    projection, filled = step.output_projection, jnp.asarray(group_filled(step)[0])
    numbers = jnp.arange(projection.shape[0], dtype=jnp.int32)[None, None, :, None]
    query_heads = group(step, numbers).reshape(filled.shape)
    values = tokens.values.swapaxes(0, 1).astype(jnp.float32)
    heads, batch, count, width = values.shape
    block = max(1, min(batch * count, BLOCK_ELEMENTS // projection.shape[-1]))
    rows = values.reshape(heads, -1, width)
    rows = jnp.pad(rows, ((0, 0), (0, -rows.shape[1] % block), (0, 0))).reshape(heads, -1, block, width)

    def of_head(head: tuple[Array, Array, Array]) -> Array:
        blocks, numbers, exists = head

        def norms(number: Array) -> Array:
            weight = _of_stored(step, number, projection[number].astype(jnp.float32))
            return jax.lax.map(lambda x: jnp.abs(x @ weight).sum(-1), blocks).reshape(-1)[: batch * count]

        each = jax.lax.map(norms, numbers)
        return jnp.where(exists[:, None], each, 0.0).sum(0) / exists.sum()

    return jax.lax.map(of_head, (rows, query_heads, filled)).reshape(heads, batch, count).swapaxes(0, 1)


def _of_stored(step: Step, number: Array, weight: Array) -> Array:
    """What stored values meet, f32 [H', D]: the output projection [H, D] of a query head, behind `finish`."""
    if step.latent is not None:
        return step.latent.up_values[number].astype(jnp.float32) @ weight
    if step.value_part is None:
        return weight
    parts = max(step.value_part) + 1
    mine = jnp.asarray(step.value_part)[number] == jnp.arange(parts)
    return jnp.where(mine[:, None, None], weight, 0.0).reshape(-1, weight.shape[-1])
