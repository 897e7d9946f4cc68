"""The network of `Predicted` (KVzap): how much later queries attend to a token, from the input of the layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from kvjax.cache.layer_cache import LayerData
from kvjax.cache.layout import CacheDims
from kvjax.cache.method import CacheMethod
from kvjax.cache.policy import Predicted, Prompt
from kvjax.cache.policy.predicted import predict
from kvjax.calibration.finder import Found, Task
from kvjax.calibration.observe import observe
from kvjax.convert.descend import descend
from kvjax.typing import Array, PyTree

SMALLEST = 1e-7
"""Attention below this is as good as none."""
BATCH = 512


@dataclasses.dataclass(frozen=True)
class Importance:
    """Target: log of the mean attention that a token gets from the queries behind it, the largest of the group's heads.

    KVzap (Jegou and Jeblick, 2026, arXiv:2601.07891) has the log of KVzip's score as its target, the largest attention
    from a repetition of the text. Here it is attention within the text itself, which takes no second pass. The linear
    network is found by ridge regression, exactly; one with a hidden layer by Adam from a random start.

    Attributes:
      ridge: added to the diagonal, as a share of its mean.
      behind: queries that a token must have behind it to count.
      steps, rate: of Adam, where there is a hidden layer.
    """

    ridge: float = 1e-3
    behind: int = 16
    steps: int = 1000
    rate: float = 1e-3

    @property
    def reads(self) -> bool:
        return True

    def fits(self, method: CacheMethod, dims: tuple[CacheDims, ...]) -> bool:
        return method.budget.evicts and isinstance(method.policy, Predicted)

    def find(self, task: Task) -> Found:
        policy = task.method.policy
        assert isinstance(policy, Predicted)
        inputs, targets = self._collect(task)
        layers, explained = [], []
        with task.track("networks", len(inputs)) as advance:
            for x, y in zip(inputs, targets, strict=True):
                data = ridge_regression(x, y, self.ridge)
                data = self._train(x, y, policy.hidden, task.seed) if policy.hidden else data
                rest = np.asarray(predict(data, jnp.asarray(x)[None]))[0].T - y
                explained.append(1 - float(rest.var() / y.var()))
                layers.append(LayerData(policy=data))
                advance()
        spelled = ", ".join(f"{share:.2f}" for share in explained)
        return Found(task.method, tuple(layers), (f"variance of the scores that is predicted, by layer: {spelled}",))

    def _collect(self, task: Task) -> tuple[list[NDArray[np.float32]], list[NDArray[np.float32]]]:
        """Per layer the inputs f32 [tokens, D] and the targets f32 [tokens, K]."""
        pieces = []
        with task.track("attention", task.steps) as advance:
            for tokens, lengths in task.given.batches(task.batch):
                counted = np.arange(tokens.shape[1]) < lengths[:, None] - self.behind
                seen = observe(task.model, _inputs_and_targets, tokens, lengths)
                pieces.append([[np.asarray(x, np.float32)[counted] for x in layer] for layer in seen])
                advance()
        joined = [[np.concatenate(x) for x in zip(*layer, strict=True)] for layer in zip(*pieces, strict=True)]
        return [x for x, _ in joined], [y for _, y in joined]

    def _train(self, x: NDArray[np.float32], y: NDArray[np.float32], hidden: int, seed: int) -> PyTree:
        rng = np.random.default_rng(seed)
        width, heads = x.shape[1], y.shape[1]
        spread = 1 / max(float(x.std()), 1e-6)
        start = {
            "hidden_kernel": rng.normal(size=(1, 1, width, hidden)) * width**-0.5 * spread,
            "hidden_bias": np.zeros((1, 1, hidden)),
            "kernel": rng.normal(size=(1, heads, hidden)) * hidden**-0.5,
            "bias": y.mean(0)[None],
        }

        def draws() -> Iterator[tuple[Array, Array]]:
            while True:
                at = rng.integers(0, len(x), BATCH)
                yield jnp.asarray(x[at]), jnp.asarray(y[at])

        def loss(data: PyTree, pair: tuple[Array, Array]) -> Array:
            return jnp.mean((predict(data, pair[0][None])[0].T - pair[1]) ** 2)

        arrays = {name: jnp.asarray(leaf, jnp.float32) for name, leaf in start.items()}
        trained = descend(loss, arrays, draws(), self.steps, self.rate)
        return {name: np.asarray(leaf) for name, leaf in trained.items()}


def ridge_regression(x: NDArray[np.float32], y: NDArray[np.float32], ridge: float) -> PyTree:
    """The linear network of `Predicted` with the least Σ (y' - y)² + ridge · mean(x²) · n · Σ kernel².

    Args:
      x: [n, D]. y: [n, K]. The bias is free.
    """
    wide, tall = np.asarray(x, np.float64), np.asarray(y, np.float64)
    middle, level = wide.mean(0), tall.mean(0)
    moments = (wide - middle).T @ (wide - middle)
    moments[np.diag_indices_from(moments)] += ridge * np.trace(moments) / len(moments)
    kernel = np.linalg.solve(moments, (wide - middle).T @ (tall - level)).T
    bias = level - kernel @ middle
    return {"kernel": kernel[None].astype(np.float32), "bias": bias[None].astype(np.float32)}


def _inputs_and_targets(prompt: Prompt) -> tuple[Array, Array]:
    """The layer's input [B, T, D], and log mean attention f32 [B, T, K]."""
    assert prompt.step.hidden is not None
    behind = jnp.maximum(prompt.lengths[:, None] - prompt.positions, 1)
    mean = prompt.mass("max") / behind[:, None]
    return prompt.step.hidden, jnp.log(mean + SMALLEST).swapaxes(1, 2)
