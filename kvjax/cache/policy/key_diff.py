"""Keep keys that point elsewhere than the others."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from kvjax.cache.layout import CacheDims
from kvjax.cache.policy.base import Policy
from kvjax.cache.policy.seen import Prompt, Slots, Tokens
from kvjax.typing import Array, PyTree


@dataclasses.dataclass(frozen=True)
class KeyDiff(Policy):
    """score = -cos(k, mean direction of the row's keys so far) (Park et al., 2025, "KeyDiff", arXiv 2504.15364).

    The state is the sum of all normalised keys, f32 [B, K, H]: evicted keys still count. (The paper takes the mean over
    the keys that are still cached, which are the same at the end of a prompt.)
    """

    def initial_state(self, dims: CacheDims) -> PyTree:
        return jnp.zeros((dims.batch, dims.kv_heads, dims.key_width), jnp.float32)

    def next_state(self, state: PyTree, tokens: Tokens) -> PyTree:
        return state + _unit(tokens.keys).sum(axis=2, where=tokens.valid[:, None, :, None])

    def prompt_scores(self, prompt: Prompt) -> Array:
        return _less_alike(prompt.keys, self.next_state(prompt.state, prompt))

    def slot_scores(self, slots: Slots) -> Array:
        return _less_alike(slots.keys, slots.state)


def _less_alike(keys: Array, total: Array) -> Array:
    return -(_unit(keys) * _unit(total)[:, :, None]).sum(axis=-1)


def _unit(x: Array) -> Array:
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-8)
