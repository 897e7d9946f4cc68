"""How the tokens of `Prefix` are shared among layers, so that each keeps the same part of its attention (PrefixKV)."""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kvjax.cache.budget import Prefix
from kvjax.cache.layout import CacheDims
from kvjax.cache.method import CacheMethod
from kvjax.cache.plan import resolve
from kvjax.cache.policy import Prompt
from kvjax.calibration.finder import Found, Task
from kvjax.calibration.observe import model_dims, observe
from kvjax.errors import UsageError
from kvjax.typing import Array

STEPS = 40
LEAST = 0.01
"""The smallest share of a layer: without it one whose attention is on its first tokens alone would get no free slot."""


@dataclasses.dataclass(frozen=True)
class PrefixShares:
    """Each sample's best lengths, averaged.

    PrefixKV (Wang et al., 2024, arXiv:2412.03409): a token's importance is the attention that it receives, summed over
    queries and heads. The lengths are those for the method's budget at the samples' length, so they should be as long
    as the prompts to come; shares are of what layers keep besides sinks and recent window. The release stops its
    bisection at an error of 5 tokens and scales; here it has 40 steps. No layer's share is below `LEAST`.
    """

    @property
    def reads(self) -> bool:
        return True

    def fits(self, method: CacheMethod, dims: tuple[CacheDims, ...]) -> bool:
        return isinstance(method.budget, Prefix)

    def find(self, task: Task) -> Found:
        method, samples = task.method, task.given
        budget = method.budget
        assert isinstance(budget, Prefix)
        size = resolve(method, model_dims(task.model, samples.length)).budget
        always = method.sinks + (method.recent if isinstance(method.recent, int) else 0)
        free, count = np.zeros(task.model.config.num_layers), 0
        with task.track("attention", task.steps) as advance:
            for tokens, lengths in samples.batches(task.batch):
                seen = np.stack([np.asarray(layer) for layer in observe(task.model, _received, tokens, lengths)])
                for row, length in enumerate(lengths):
                    kept = size.tokens(int(length))
                    if always < kept < length:
                        best = prefix_lengths(seen[:, row, :length], kept * len(seen))
                        free += np.maximum(best - always, 0) / length
                        count += 1
                advance()
        if count == 0 or not free.any():
            raise UsageError(
                f"method {method.name!r}: its budget leaves nothing to share among layers at the samples' "
                f"{samples.length} tokens; give longer samples or another budget"
            )
        shares = tuple(float(share) for share in np.round(np.maximum(free / free.sum(), LEAST), 6))
        spelled = ", ".join(f"{share:.2f}" for share in shares)
        return Found(dataclasses.replace(method, budget=dataclasses.replace(budget, shares=shares)), (), (spelled,))


def prefix_lengths(importance: ArrayLike, total: float) -> NDArray[np.int64]:
    """How many of its most important tokens each layer keeps, so that all keep the same part, int64 [L].

    n_l(p) is the least number of tokens whose importance is the part p of the layer's; p is found by bisection such
    that the n_l sum up to `total`, or to what comes nearest from below.

    Args:
      importance: [L, T], not negative.
    """
    importance = np.asarray(importance, np.float64)
    reached = np.cumsum(np.sort(importance, axis=1)[:, ::-1], axis=1)
    reached /= reached[:, -1:]

    def lengths(part: float) -> NDArray[np.int64]:
        return (reached < part).sum(1) + 1

    low, high = 0.0, 1.0
    for _ in range(STEPS):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if lengths(middle).sum() <= total else (low, middle)
    return lengths(low)


def _received(prompt: Prompt) -> Array:
    """Attention that each token receives, summed over queries and heads: f32 [B, T]."""
    return prompt.mass("sum").sum(1)
