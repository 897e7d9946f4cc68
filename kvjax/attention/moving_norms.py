"""Query heads allotted by how key norms move while a model trains (DGQA: Khan et al., 2024, arXiv 2408.08454).

The norms are a training state like an optimizer's: one `MovingNorms` per layer goes in where a layer's cache does, and
the next one comes out.

    states = tuple(MovingNorms.start(Difference(), heads, kv_heads) for _ in range(layers))
    logits, states = Transformer(config).apply({"params": params}, tokens, positions, states)

For evaluation `frozen` holds them; `layer_maps` makes a model out of what they have come to.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.attention.allocation import contiguous, head_counts, key_norms
from kvjax.attention.base import attend
from kvjax.attention.key_driven import LayerMaps
from kvjax.cache.step import Step
from kvjax.typing import Array

Moves = Literal["by window", "always", "never"]


class Weighting(Protocol):
    """From norms to weights; a frozen, hashable value."""

    def weights(self, norms: Array, kept: Array) -> Array:
        """f32 [K], not negative: of this call's norms and those kept."""
        ...


@dataclasses.dataclass(frozen=True)
class Difference:
    """DGQA-diff: kv heads whose key norms have changed most serve most query heads; |kept - norms|."""

    def weights(self, norms: Array, kept: Array) -> Array:
        """See `Weighting`."""
        return jnp.abs(kept - norms)


@dataclasses.dataclass(frozen=True)
class Average:
    """DGQA-EMA: by a moving average of key norms, `share` · norms + (1 - share) · kept."""

    share: float = 0.9

    def weights(self, norms: Array, kept: Array) -> Array:
        """See `Weighting`."""
        return self.share * norms + (1 - self.share) * kept


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MovingNorms:
    """One layer's norms, and the map that they have led to; stands where a layer's cache does.

    In the first call and every `window` calls after it, m_g = the sum over rows of |K_g| makes a new map from the
    rule's weights (`head_counts`), and what is kept becomes (kept + m) / `window`, as released. So kept norms are about
    m / `window`: small beside m, and both rules' weights stay near m itself. The map is the same for all rows.

    The release goes on at evaluation: moves="always" is what it does there, a new map in every call, with m kept as it
    is. Then `Difference` compares a batch with the one before it, and what a row reads depends on both. The release
    also repairs rounding at random kv heads; here it is as in `head_counts`.

    Attributes:
      kept: f32 [K]. calls: int32 [], how many this layer has seen. head_map: int32 [N].
      inner: what attends, such as `Bidirectional()` or a cache; None: tokens attend among themselves, causally.
      rule: static.
      window: static, calls.
      least: static, query heads that every kv head serves; 0 as released.
      moves: static; "by window" for training, "never" and "always" for evaluation.
    """

    kept: Array
    calls: Array
    head_map: Array
    inner: Any = None
    rule: Weighting = dataclasses.field(default=Difference(), metadata={"static": True})
    window: int = dataclasses.field(default=300, metadata={"static": True})
    least: int = dataclasses.field(default=1, metadata={"static": True})
    moves: Moves = dataclasses.field(default="by window", metadata={"static": True})

    @classmethod
    def start(
        cls, rule: Weighting, heads: int, kv_heads: int, *, inner: Any = None, window: int = 300, least: int = 1
    ) -> MovingNorms:
        """A layer that has seen nothing: N query heads in K equal groups."""
        reads = jnp.asarray(np.arange(heads) * kv_heads // heads, jnp.int32)
        return cls(jnp.zeros(kv_heads), jnp.int32(0), reads, inner, rule, window, least)

    def step(self, step: Step) -> tuple[Array, MovingNorms]:
        """As `LayerCacheProtocol.step`."""
        moved = self if self.moves == "never" else self._moved(key_norms(step).sum(0))
        reads = jnp.broadcast_to(moved.head_map, (len(step.queries), len(moved.head_map)))
        out, inner = attend(dataclasses.replace(step, head_map=reads), self.inner)
        return out, dataclasses.replace(moved, inner=inner)

    def frozen(self) -> MovingNorms:
        """For evaluation: the map stays."""
        return dataclasses.replace(self, moves="never")

    def _moved(self, norms: Array) -> MovingNorms:
        """The state after a call with norms f32 [K]."""
        heads, always = len(self.head_map), self.moves == "always"
        due = always | (self.calls % self.window == 0)
        reads = contiguous(head_counts(self.rule.weights(norms, self.kept), heads, self.least), heads)
        return dataclasses.replace(
            self,
            kept=jnp.where(due, norms if always else (self.kept + norms) / self.window, self.kept),
            calls=self.calls + 1,
            head_map=jnp.where(due, reads, self.head_map),
        )


def layer_maps(states: Sequence[MovingNorms]) -> LayerMaps:
    """The attention of a model whose layers keep the maps that these states have come to."""
    return LayerMaps(tuple(tuple(int(head) for head in state.head_map) for state in states))
