"""The decode loop: one compiled program for a run of steps, over a donated cache."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kvjax.cache.model_cache import ModelCache
from kvjax.engine.sampling import Sampler
from kvjax.models.transformer import Transformer
from kvjax.typing import Array, PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """All that changes while decoding.

    Attributes:
      cache: of all tokens so far.
      logits: f32 [B, V], for the next token.
      done: bool [B], rows that have stopped.
    """

    cache: ModelCache
    logits: Array
    done: Array


@jax.jit(static_argnames=("module", "sampler", "stop", "size"), donate_argnames=("state",))
def decode(
    module: Transformer,
    sampler: Sampler,
    stop: tuple[int, ...],
    size: int,
    params: PyTree,
    state: DecodeState,
    key: Array,
    start: ArrayLike,
    steps: ArrayLike,
) -> tuple[DecodeState, Array]:
    """Decodes `steps` tokens per row, at most `size`; how many is data, so one program serves every run.

    A row is done with the first token in `stop`; from then on it appends nothing and emits -1.

    Args:
      key: PRNG key; step i of this run draws with fold_in(key, start + i).
      start: int32, steps of earlier runs.

    Returns:
      The state, and the tokens int32 [B, size]: a stop token is emitted, and -1 from `steps` on.
    """
    ends = jnp.array(stop, jnp.int32)

    def one(i: Array, carry: tuple[DecodeState, Array]) -> tuple[DecodeState, Array]:
        state, tokens = carry
        token = sampler.sample(state.logits, jax.random.fold_in(key, start + i))
        tokens = tokens.at[:, i].set(jnp.where(state.done, -1, token))
        done = state.done | jnp.isin(token, ends)
        logits, layers = module.apply(
            {"params": params},
            token[:, None],
            cache=state.cache.layers,
            valid=~done[:, None],
            logits_at=jnp.zeros_like(token),
            draws=state.cache.draws,
        )
        return DecodeState(state.cache.stepped(layers), logits[:, 0], done), tokens

    tokens = jnp.full((state.done.shape[0], size), -1, jnp.int32)
    return jax.lax.fori_loop(0, steps, one, (state, tokens))
