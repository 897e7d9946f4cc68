"""`Repeating`: a layer's recorded prompt while the model repeats a piece of it, and the attention its tokens get."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from kvjax.cache.policy import Repetition
from kvjax.cache.prompt import all_keys, finish, group_filled, group_queries, rotate, ungroup
from kvjax.cache.step import Step
from kvjax.typing import Array
from pallas_kernels import DenseLoader, attention_mass, decode_attention, merge, prefill_attention


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Repeating:
    """Takes one step: an instruction, then the tokens `start` to `stop` of the prompt, at the positions that follow it.

    Attributes:
      context: the whole prompt's step, T tokens.
      scores: f32 [B, K, T]; the step replaces those of the piece.
      start, stop: int32 [B], each row's piece; empty where they are equal.
      size: static; the most tokens of a piece.
      sinks: static; how many first tokens take part in the softmax that scores are taken from.
    """

    context: Step
    scores: Array
    start: Array
    stop: Array
    size: int = dataclasses.field(metadata={"static": True})
    sinks: int = dataclasses.field(metadata={"static": True})

    @property
    def length(self) -> Array:
        """int32 [B], tokens of each row's prompt."""
        return self.context.valid.sum(-1, dtype=jnp.int32)

    def step(self, step: Step) -> tuple[Array, Repeating]:
        """Attention [B, Q, N, H] to the prompt and, causally, to the step itself; nothing of the step is kept."""
        queries, context = rotate(step, group_queries(step)), self.context
        keys, own_keys = (rotate(x, all_keys(x)) for x in (context, step))
        batch, heads, group, count, head_dim = queries.shape
        rows = queries.reshape(batch, heads, group * count, head_dim)
        out, lse = decode_attention(
            rows,
            DenseLoader(keys),
            DenseLoader(context.values.swapaxes(1, 2)),
            valid=context.valid[:, None],
            positions=context.positions[:, None],
            query_positions=jnp.tile(step.positions, (1, group)),
            window=step.window,
            scale=step.scale,
            softcap=step.softcap,
        )
        own, own_lse = prefill_attention(
            queries,
            own_keys,
            step.values.swapaxes(1, 2),
            valid=step.valid,
            window=step.window,
            scale=step.scale,
            softcap=step.softcap,
        )
        merged, _ = merge([(out, lse), (own.reshape(out.shape), own_lse.reshape(lse.shape))])
        output = ungroup(step, merged.reshape(*queries.shape[:4], -1).astype(step.queries.dtype))
        return finish(step, output), dataclasses.replace(self, scores=self._scored(step, queries, keys, own_keys))

    def _scored(self, step: Step, queries: Array, keys: Array, own_keys: Array) -> Array:
        """The scores, with those of the piece: the largest probability of each token in a softmax over the first
        tokens, the piece, and what of the repetition a query sees."""
        filled = group_filled(step)
        if not filled.all():  # a place without a query head of its own repeats the group's first
            queries = jnp.where(filled[..., None, None], queries, queries[:, :, :1])
        first = jnp.broadcast_to(jnp.arange(self.sinks, dtype=jnp.int32), (len(self.start), self.sinks))
        piece = self.start[:, None] + jnp.arange(self.size, dtype=jnp.int32)
        places = jnp.concatenate([first, piece], axis=1)
        there = jnp.concatenate([first < self.start[:, None], piece < self.stop[:, None]], axis=1)
        shared = jnp.take_along_axis(keys, jnp.minimum(places, keys.shape[2] - 1)[:, None, :, None], axis=2)
        received = attention_mass(
            queries,
            jnp.concatenate([shared, own_keys], axis=2),
            None,
            query_positions=step.positions,
            key_positions=jnp.concatenate([places, step.positions], axis=1),
            query_valid=step.valid,
            key_valid=jnp.concatenate([there, step.valid], axis=1),
            window=step.window,
            scale=step.scale,
            softcap=step.softcap,
            reduce="max",
            over="max",
        )
        assert isinstance(received, jax.Array)
        at = jnp.where(there[:, self.sinks :], piece, keys.shape[2])  # what is beyond the end is dropped
        rows, heads = jnp.arange(len(at))[:, None, None], jnp.arange(keys.shape[1])[:, None]
        mine = received[:, :, self.sinks : self.sinks + self.size]
        return self.scores.at[rows, heads, at[:, None]].set(mine, mode="drop")


def repeating(context: Step, repetition: Repetition, size: int) -> Repeating:
    """A recorded prompt before its first piece of at most `size` tokens."""
    batch, tokens, heads, _ = context.keys.shape
    none = jnp.zeros((batch,), jnp.int32)
    return Repeating(context, jnp.zeros((batch, heads, tokens), jnp.float32), none, none, size, repetition.sinks)
