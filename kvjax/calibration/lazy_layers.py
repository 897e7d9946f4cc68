"""Which layers look at little else than the first and the newest tokens (SimLayerKV)."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from kvjax.cache.budget import LayerTable
from kvjax.cache.layout import CacheDims
from kvjax.cache.method import CacheMethod
from kvjax.cache.policy import Prompt
from kvjax.cache.prompt import probabilities
from kvjax.calibration.finder import Found, Task
from kvjax.calibration.observe import observe
from kvjax.calibration.parts import whole_and_cut
from kvjax.errors import UsageError
from kvjax.typing import Array


@dataclasses.dataclass(frozen=True)
class LazyLayers:
    """A layer is lazy if its last queries give more than a threshold of their attention to sinks and recent window.

    SimLayerKV (Zhang et al., 2024, arXiv:2410.13846), whose decision is for every prompt by itself; here it is for the
    model, by the mean over samples, for slots are allocated before a prompt is seen.

    Attributes:
      threshold: depends on the model: 0.9 for Llama 3, 0.65 for Llama 2, 0.8 for Mistral, 0.85 for Qwen.
      queries: how many of the last ones are asked.
    """

    threshold: float = 0.9
    queries: int = 1

    @property
    def reads(self) -> bool:
        return True

    def fits(self, method: CacheMethod, dims: tuple[CacheDims, ...]) -> bool:
        return isinstance(method.budget, LayerTable)

    def find(self, task: Task) -> Found:
        method = task.method
        budget = method.budget
        assert isinstance(budget, LayerTable)
        whole, cut = whole_and_cut(budget.budgets)
        if not isinstance(method.recent, int) or task.given.lengths.max() <= method.sinks + method.recent:
            raise UsageError(
                f"method {method.name!r} keeps {method.sinks} sinks and {method.recent} recent tokens, and no "
                f"sample is longer ({task.given.length}): all layers would seem lazy. Give longer ones, or keep less."
            )
        look = Ends(method.sinks, method.recent, self.queries)
        masses = []
        with task.track("attention", task.steps) as advance:
            for tokens, lengths in task.given.batches(task.batch):
                seen = np.stack([np.asarray(layer) for layer in observe(task.model, look, tokens, lengths)])
                masses.append(seen[:, lengths > method.sinks + method.recent])
                advance()
        mean = np.concatenate(masses, axis=1).mean(1)
        table = tuple(cut if mass > self.threshold else whole for mass in mean)
        spelled = ", ".join(f"{mass:.2f}" for mass in mean)
        return Found(
            dataclasses.replace(method, budget=dataclasses.replace(budget, table=table)),
            (),
            (f"attention to sinks and recent window, by layer: {spelled}; lazy above {self.threshold:g}",),
        )


@dataclasses.dataclass(frozen=True)
class Ends:
    """A look: f32 [B], the attention of the last queries on the first `sinks` and the `recent` newest tokens.

    The mean over query heads and `queries`; the newest token counts, and so does a query's attention to itself.
    """

    sinks: int
    recent: int
    queries: int

    def __call__(self, prompt: Prompt) -> Array:
        step = prompt.step
        queries, positions, exists = prompt.last_queries(self.queries)
        index = jnp.maximum(positions, 0)[:, None, None]
        lse = jnp.take_along_axis(prompt.log_sum_exp, index, axis=3)
        p = probabilities(step, queries, prompt.keys, lse, positions, prompt.positions)
        ends = (prompt.positions < self.sinks) | (prompt.positions >= prompt.lengths[:, None] - self.recent)
        p = jnp.where((exists[:, :, None] & ends[:, None])[:, None, None], p, 0.0)
        return p.sum((1, 2, 3, 4)) / (step.queries.shape[2] * jnp.maximum(exists.sum(-1), 1))
