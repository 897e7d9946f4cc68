"""Keep what a softmax of noisy, ever flatter logits likes."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from kvjax.cache.layout import CacheDims
from kvjax.cache.policy.base import GroupReduce, Perturbed, Policy
from kvjax.cache.policy.seen import Prompt, Slots, Tokens
from kvjax.errors import UsageError
from kvjax.typing import Array, PyTree
from pallas_kernels.attention_mass import GumbelNoise


@dataclasses.dataclass(frozen=True)
class Keyformer(Policy):
    """score_j = sum over queries of softmax((q·k + Gumbel noise) / tau)_j (Adnan et al., 2024, arXiv 2403.09054).

    tau is `start` for the prompt's queries and rises by (end - start) / steps with every decoded token. The softmax is
    over the tokens that are still cached; attention itself knows neither noise nor tau. The noise is a function of
    (seed, layer, query head, query position, key position). The state is the length of each row's prompt, int32 [B, K].

    Attributes:
      start, end: of tau; 1 and 2 in the paper.
      steps: decoded tokens after which tau stays at `end`: how many one expects to decode.
      seed: another seed keeps other tokens.
      noisy: False leaves the noise out (the paper's ablation).
    """

    perturbs: ClassVar[bool] = True

    start: float = 1.0
    end: float = 2.0
    steps: int = 256
    seed: int = 0
    noisy: bool = True

    def __post_init__(self) -> None:
        if not (self.start > 0 and self.end > 0 and self.steps >= 1 and isinstance(self.seed, int)):
            raise UsageError(
                f"Keyformer needs start, end > 0, steps >= 1 and a seed that is a whole number; got {self}"
            )

    @property
    def mass_reduce(self) -> GroupReduce:
        return "sum"

    def initial_state(self, dims: CacheDims) -> PyTree:
        return jnp.zeros((dims.batch, dims.kv_heads), jnp.int32)

    def next_state(self, state: PyTree, tokens: Tokens) -> PyTree:
        return state if tokens.decoding else state + tokens.valid.sum(-1, dtype=jnp.int32, keepdims=True)

    def perturbed(self, tokens: Tokens) -> Perturbed:
        decoded = jnp.zeros_like(tokens.positions)
        if tokens.decoding:
            decoded = jnp.clip(tokens.positions - tokens.state[:, :1] + 1, 0, self.steps)
        tau = self.start + decoded.astype(jnp.float32) * ((self.end - self.start) / self.steps)
        key = jax.random.key_data(jax.random.key(self.seed, impl="threefry2x32"))
        return Perturbed(GumbelNoise(key, tokens.head_index) if self.noisy else None, 1 / tau)

    def prompt_scores(self, prompt: Prompt) -> Array:
        return prompt.mass("sum", perturbed=self.perturbed(prompt))

    def slot_scores(self, slots: Slots) -> Array:
        assert slots.stats is not None
        return slots.stats
