"""Training on text after a conversion: all weights, or low-rank changes of them that are merged at the end.

LoRA: Hu et al., 2021, arXiv 2106.09685. Yu et al. (2024, arXiv 2406.07056) recover with ranks of 256 and 512 at 7
and 13 billion parameters, and alpha twice the rank.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from kvjax.convert.descend import descend
from kvjax.errors import UsageError
from kvjax.models.language_model import LanguageModel
from kvjax.models.transformer import Transformer
from kvjax.typing import Array, PyTree


@dataclasses.dataclass(frozen=True)
class Recovery:
    """How weights are trained.

    Attributes:
      train: "all" weights, or "lora": an update of low rank of every matrix in the layers, but for embeddings.
      steps: of AdamW (`kvjax.convert.descend`). rate: the highest learning rate. batch: rows of a step.
      rank: of the updates; alpha: they are multiplied by alpha / rank, 2 where it is None.
      seed: of the order of rows and of the first adapters.
    """

    train: Literal["lora", "all"] = "lora"
    steps: int = 200
    rate: float = 1e-3
    batch: int = 8
    rank: int = 16
    alpha: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.steps, self.batch, self.rank) < 1 or self.rate <= 0:
            raise UsageError(
                f"recovery needs at least one step, row and rank, and a positive rate; got steps={self.steps}, "
                f"batch={self.batch}, rank={self.rank}, rate={self.rate}."
            )


def recover(
    model: LanguageModel,
    tokens: NDArray[np.int32],
    lengths: NDArray[np.int32],
    recovery: Recovery = Recovery(),
    done: Callable[[float], None] = lambda loss: None,
) -> LanguageModel:
    """The model after training on rows of text, its config and the dtype of its parameters unchanged.

    Weights are trained in float32; adapters are merged into them at the end, so nothing is added to the model.

    Args:
      tokens: int32 [n, T], the rows that batches are drawn from. lengths: int32 [n], tokens that each has.
      done: called after each step with its loss, nats per token.
    """
    wide = jax.tree.map(lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, model.params)
    lora = recovery.train == "lora"
    start = _adapters(wide, recovery) if lora else wide
    scale = _scale(recovery)

    def full(trained: PyTree, base: PyTree) -> PyTree:
        return merged(base, trained, scale) if lora else trained

    def loss(trained: PyTree, one: PyTree) -> Array:
        return mean_surprisal(model.module, full(trained, one["base"]), one["tokens"], one["lengths"])

    # The frozen weights come with every batch: closed over, they would be constants of the compiled program.
    base = wide if lora else ()
    batches = ({"base": base, "tokens": t, "lengths": n} for t, n in _draws(tokens, lengths, recovery))
    trained = descend(loss, start, batches, recovery.steps, recovery.rate, done=done)
    params = jax.tree.map(lambda x, old: x.astype(old.dtype), jax.jit(full)(trained, wide), model.params)
    return dataclasses.replace(model, params=params)


def mean_surprisal(module: Transformer, params: PyTree, tokens: Array, lengths: Array) -> Array:
    """Nats per token, f32 [], over all tokens behind the first of rows int32 [B, T] with so many tokens, int32 [B]."""
    valid = jnp.arange(tokens.shape[1]) < lengths[:, None]
    logits, _ = module.apply({"params": params}, tokens, valid=valid)  # pyright: ignore[reportGeneralTypeIssues]
    surprisal = -jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], axis=-1)[..., 0]
    counted = valid[:, 1:]
    return jnp.where(counted, surprisal, 0.0).sum() / jnp.maximum(counted.sum(), 1)


def merged(params: PyTree, adapters: PyTree, scale: float) -> PyTree:
    """W + scale · A B for every kernel that has adapters, by its path: {"down": A [in, r], "up": B [r, out]}."""
    flat: dict[Any, Any] = dict(flax.traverse_util.flatten_dict(params))  # pyright: ignore[reportAssignmentType]
    for path, factors in adapters.items():
        change = jnp.matmul(factors["down"], factors["up"], precision="highest")
        key = tuple(path.split("/"))
        flat[key] = flat[key] + scale * change.reshape(flat[key].shape)
    return flax.traverse_util.unflatten_dict(flat)


def _adapters(params: PyTree, recovery: Recovery) -> PyTree:
    """First adapters of all kernels in layers: A is random, B is zero, so that nothing has changed yet."""
    rng = np.random.default_rng(recovery.seed)
    flat = flax.traverse_util.flatten_dict(params)
    found = {}
    for path, kernel in sorted(flat.items()):
        if not path[0].startswith("layers_") or path[-1] != "kernel":
            continue
        inputs = math.prod(kernel.shape[: 2 if path[-2] == "o" else 1])
        rank = min(recovery.rank, inputs, kernel.size // inputs)
        down = rng.standard_normal((inputs, rank)) / math.sqrt(inputs)
        up = jnp.zeros((rank, kernel.size // inputs), jnp.float32)
        found["/".join(path)] = {"down": jnp.asarray(down, jnp.float32), "up": up}
    return found


def _scale(recovery: Recovery) -> float:
    return 2.0 if recovery.alpha is None else recovery.alpha / recovery.rank


def _draws(tokens: NDArray[np.int32], lengths: NDArray[np.int32], recovery: Recovery) -> Iterator[tuple[Array, Array]]:
    """Batches without end: every row once, in random order, then again."""
    rng = np.random.default_rng([recovery.seed, len(tokens)])
    left = np.zeros(0, np.int64)
    while True:
        while len(left) < recovery.batch:
            left = np.concatenate([left, rng.permutation(len(tokens))])
        now, left = left[: recovery.batch], left[recovery.batch :]
        yield jnp.asarray(tokens[now]), jnp.asarray(lengths[now])
