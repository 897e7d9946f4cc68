"""The values of the slots that matter most to a query, after all keys have been read."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from kvjax.cache.policy.base import check_word
from kvjax.cache.selector.base import Selector
from kvjax.errors import UsageError
from kvjax.typing import Array
from pallas_kernels.logits import finite_max

Renormalise = Literal["loaded", "all"]


@dataclasses.dataclass(frozen=True)
class TopValues(Selector):
    """Selective loading of values (Lin et al., 2025, "Sigma", arXiv:2501.13629, section 2).

    A decoded token reads all keys, and the values of the `count` slots with the largest logits alone, each query head
    its own. All compete: sinks, body, what a fate keeps aside, recent window and the token itself; of equal logits the
    first in this order wins. Steps of several tokens (prompts, chunks, questions) read all values.

    Policies that sum attention while decoding see the whole softmax, of which every key's score is known.

    Attributes:
      count: slots whose values are loaded (100 in the paper).
      renormalise: the paper leaves open over which slots the weights of those that are loaded sum to one: "loaded",
        over these, or "all", so that what is left out is missing from the sum.
    """

    count: int = 100
    renormalise: Renormalise = "loaded"

    def __post_init__(self) -> None:
        check_word(self, "renormalise", Renormalise)
        if self.count < 1:
            raise UsageError(f"TopValues loads at least one value; got count={self.count}")

    @property
    def page(self) -> None:
        return None

    @property
    def values(self) -> int:
        return self.count

    def weigh(self, logits: Array) -> tuple[Array, Array]:
        best, slots = jax.lax.top_k(logits, self.count)
        top = finite_max(best)
        weights = jnp.exp(best - top)
        among = weights if self.renormalise == "loaded" else jnp.exp(logits - top)
        total = jnp.sum(among, axis=-1, keepdims=True)
        return slots, weights / jnp.where(total == 0, 1.0, total)
