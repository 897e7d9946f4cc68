"""The decode loop: one compiled program for a run of steps, over a donated cache."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

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
      key: PRNG key; step i uses fold_in(key, i).
      steps: int32, steps so far.
    """

    cache: ModelCache
    logits: Array
    done: Array
    key: Array
    steps: Array


@jax.jit(static_argnames=("module", "sampler", "stop", "steps"), donate_argnames=("state",))
def decode(
    module: Transformer, sampler: Sampler, stop: tuple[int, ...], steps: int, params: PyTree, state: DecodeState
) -> tuple[DecodeState, Array]:
    """Decodes `steps` tokens per row.

    A row is done with the first token in `stop`; from then on it appends nothing and emits -1.

    Returns:
      The state, and the tokens int32 [B, steps] (a stop token is emitted).
    """

    def one(state: DecodeState, _: None) -> tuple[DecodeState, Array]:
        token = sampler.sample(state.logits, jax.random.fold_in(state.key, state.steps))
        emitted = jnp.where(state.done, -1, token)
        done = state.done | jnp.isin(token, jnp.array(stop, jnp.int32))
        logits, layers = module.apply(
            {"params": params},
            token[:, None],
            cache=state.cache.layers,
            valid=~done[:, None],
            logits_at=jnp.zeros_like(token),
        )
        cache = dataclasses.replace(state.cache, layers=layers)
        return DecodeState(cache, logits[:, 0], done, state.key, state.steps + 1), emitted

    state, tokens = jax.lax.scan(one, state, length=steps)
    return state, tokens.T
