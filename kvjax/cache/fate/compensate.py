"""Losers live on as one weighted mean."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from kvjax.cache.codec import Identity
from kvjax.cache.fate.base import Fate
from kvjax.cache.layout import CacheDims, Layout
from kvjax.cache.policy.seen import Prompt
from kvjax.cache.segment import Segment
from kvjax.typing import Array

EXACT = Identity()


@dataclasses.dataclass(frozen=True)
class Compensate(Fate):
    """One slot per head: the mean key and the mean value of all that was lost (RazorAttention, Tang et al., 2024).

    With N lost tokens of mean key k and mean value v, attention sees exp(q·k + log N) v in their place
    (arXiv:2407.15891, section 3.3; the released code stores the mean as one ordinary token, without N).

    Attributes:
      weighted: whether the slot has the weight N, as in the paper, or 1, as in the release.
    """

    weighted: bool = True

    @property
    def summary(self) -> str:
        return "one mean token" + " of weight N" * self.weighted

    @property
    def needs_rotated(self) -> bool:
        return True

    def aside(self, dims: CacheDims, layout: Layout, per_head: bool) -> Segment | None:
        # A mean of many tokens moves by less than a bfloat16 can tell.
        exact = dataclasses.replace(dims, dtype="float32")
        empty = Segment.empty(exact, 1, EXACT, EXACT, per_head=per_head, stats=False)
        weight = jnp.zeros(empty.positions.shape, jnp.float32)
        return dataclasses.replace(empty, weight=weight, weighs=self.weighted)

    def settle(self, aside: Segment, keys: Array, values: Array, lost: Array, prompt: Prompt) -> Segment:
        return self._add(aside, keys, values, lost)

    def receive(self, aside: Segment, keys: Array, values: Array, positions: Array, lost: Array) -> Segment:
        return self._add(aside, keys, values, lost[..., None] & (positions >= 0))

    def _add(self, aside: Segment, keys: Array, values: Array, lost: Array) -> Segment:
        """keys, values [B, K, n, H]; lost bool [B, K or 1, n]."""
        assert aside.weight is not None
        weight = aside.weight
        number = lost.sum(-1, keepdims=True).astype(jnp.float32)
        total = weight + number
        share = number / jnp.maximum(total, 1.0)

        def mean(old: Array, new: Array) -> Array:
            new = jnp.where(lost[..., None], new.astype(jnp.float32), 0.0).sum(2, keepdims=True)
            new = new / jnp.maximum(number, 1.0)[..., None]
            old = jnp.where(weight[..., None] > 0, old, 0.0)
            return (old + (new - old) * share[..., None]).astype(aside.keys.dtype)

        return dataclasses.replace(
            aside,
            keys=mean(aside.keys, keys),
            values=mean(aside.values, values),
            positions=jnp.where(total > 0, 0, aside.positions),
            weight=total,
        )
