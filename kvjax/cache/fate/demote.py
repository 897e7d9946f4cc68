"""Losers are kept in fewer bits."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp

from kvjax.cache.codec import Codec, Integer
from kvjax.cache.fate.base import Fate
from kvjax.cache.layout import CacheDims, Layout, ceil_to
from kvjax.cache.policy.seen import Prompt
from kvjax.cache.segment import Segment, at_positions, where_true
from kvjax.typing import Array


@dataclasses.dataclass(frozen=True)
class Demote(Fate):
    """Losers move, one way, to a second tier with codecs of its own (MiKV, Yang et al., 2024, arXiv:2402.18096).

    Nothing is forgotten: the budget says how many tokens keep the precision of the body.

    Attributes:
      keys, values: how the second tier stores them.
    """

    keys: Codec = Integer(bits=2, group=64)
    values: Codec = Integer(bits=2, group=64)

    @property
    def summary(self) -> str:
        return f"keep in {type(self.keys).__name__} / {type(self.values).__name__}"

    @property
    def codecs(self) -> tuple[Codec, ...]:
        return self.keys, self.values

    def aside(self, dims: CacheDims, layout: Layout, per_head: bool) -> Segment | None:
        # A block more than what is left: the tokens of a body are counted in whole blocks.
        slots = ceil_to(dims.max_length - layout.sinks - layout.ring - layout.kept, layout.block) + layout.block
        return Segment.empty(dims, slots, self.keys, self.values, per_head=per_head, stats=False)

    def settle(self, aside: Segment, keys: Array, values: Array, lost: Array, prompt: Prompt) -> Segment:
        positions = where_true(lost, aside.slots, math.lcm(self.keys.block, self.values.block))
        fitted = aside.fitted(keys, values, prompt)
        return fitted.fill(at_positions(keys, positions), at_positions(values, positions), positions, None)

    def receive(self, aside: Segment, keys: Array, values: Array, positions: Array, lost: Array) -> Segment:
        block = positions.shape[-1]
        used = (aside.positions[..., ::block] >= 0).sum(-1, dtype=jnp.int32)
        target = jnp.where(lost, used, aside.slots // block)
        return aside.write(keys, values, positions, None, target, block)
