"""A part of the budget goes to tokens that stand for the others."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import jax.numpy as jnp

from kvjax.cache.exchange import sum_over_heads
from kvjax.cache.fate.base import Fate
from kvjax.cache.policy.base import check_word
from kvjax.cache.policy.random import hash_uniform
from kvjax.cache.policy.seen import Prompt, ranks
from kvjax.errors import UsageError
from kvjax.typing import Array

Anchor = Literal["alternating", "mean", "zeros", "ones", "random"]


@dataclasses.dataclass(frozen=True)
class Represent(Fate):
    """KVCrush (Jha et al., 2025, arXiv:2503.00022), on top of any policy; a reconstruction of the paper.

    A token's signature has one bit per kv head of the layer: whether it is among those that the head would keep. The
    best 1 - share of each head's places go to the policy's best tokens. The others go to tokens at even strides over
    the rest, in the order of their Hamming distance to an anchor (and of their positions where distances are equal).
    Released implementations have other signatures: bits of the tokens of a page.

    Heads exchange one number per token, the distance, once, at the end of the prompt.

    Attributes:
      share: of the places that go to representatives, in (0, 1).
      anchor: what signatures are compared with; "mean" is the majority of each bit.
      seed: of a random anchor.
    """

    scope: ClassVar[Literal["head", "layer"]] = "layer"

    share: float = 0.25
    anchor: Anchor = "alternating"
    seed: int = 0

    def __post_init__(self) -> None:
        check_word(self, "anchor", Anchor)
        if not 0 < self.share < 1:
            raise UsageError(f"Represent: share lies between 0 and 1; got {self.share}")

    @property
    def summary(self) -> str:
        return f"{self.share:.0%} of the places to representatives"

    def rescore(self, scores: Array, eligible: Array, take: Array, prompt: Prompt) -> Array:
        rank = ranks(jnp.where(eligible, -scores, jnp.inf))
        signature = (rank < take) & eligible
        apart = jnp.where(signature != self._anchor(signature, eligible, prompt), 1, 0)
        distance = sum_over_heads(apart)

        represented = jnp.floor(take * self.share + 1e-4).astype(jnp.int32)
        important = rank < take - represented
        candidate = eligible & ~important
        count = candidate.sum(-1, keepdims=True)
        # Distances first, positions where they are equal: `ranks` is stable.
        order = ranks(jnp.where(candidate, distance.astype(jnp.float32), jnp.inf))
        # The candidates at floor(i · count / represented) in that order.
        chosen = _step(order, represented, count) > _step(order - 1, represented, count)
        return jnp.where(important, 2.0, jnp.where(candidate & chosen, 1.0, 0.0))

    def _anchor(self, signature: Array, eligible: Array, prompt: Prompt) -> Array:
        """bool [B or 1, K or 1, 1]."""
        if self.anchor == "mean":
            return 2 * signature.sum(-1, keepdims=True) > eligible.sum(-1, keepdims=True)
        if self.anchor == "alternating":
            return (prompt.head_index % 2 == 1)[None, :, None]
        if self.anchor == "random":
            return hash_uniform(self.seed, prompt.head_index, jnp.zeros((1, 1, 1), jnp.int32)) < 0.5
        return jnp.full((1, 1, 1), self.anchor == "ones")


def _step(order: Array, places: Array, count: Array) -> Array:
    """How many of the `places` strides begin at or before a candidate: ceil((order + 1) · places / count)."""
    count, places = (jnp.maximum(x, 1).astype(jnp.uint32) for x in (count, places))
    begun = (order + 1).astype(jnp.uint32) * places  # below 2**32 for contexts up to 128K tokens at half of them kept
    return jnp.minimum((begun + count - 1) // count, places).astype(jnp.int32)
