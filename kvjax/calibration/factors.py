"""The two factors of `LowRank` (CSKV), from weights or from keys and values of sample texts, and their training."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from kvjax.cache.codec import Identity, LowRank
from kvjax.cache.layer_cache import LayerData
from kvjax.cache.layout import CacheDims
from kvjax.cache.method import CacheMethod
from kvjax.cache.policy import Prompt
from kvjax.calibration.finder import Found, Task
from kvjax.calibration.observe import Pair, model_dims, observe
from kvjax.calibration.parts import any_codec, codecs_of
from kvjax.convert.low_rank import Factors, activation_factors, principal_factors, singular_factors
from kvjax.convert.reconstruction import reconstruction_error, train_factors
from kvjax.errors import UsageError, unknown
from kvjax.models.config import TransformerConfig
from kvjax.typing import Array

Start = Literal["principal", "svd", "asvd"]


@dataclasses.dataclass(frozen=True)
class LowRankFactors:
    """Keys and values of the samples are collected, first factors made, and trained to rebuild them, layer by layer.

    CSKV (Wang et al., 2024, arXiv:2409.10593, sections 3.2 and 3.3). Keys and values of all samples are held on the
    host, 8 bytes per token and channel.

    Attributes:
      start: 'svd' of the weights, 'asvd' (the same with each input channel weighted by what it usually is; the paper's
        best), or 'principal' (the best pair for the samples' keys and values themselves).
      steps: of training; None is 200 where latents are coded, and 0 where they are exact and the start is 'principal',
        for then there is nothing to gain.
      rate: of Adam. The release has 5e-5 for one pass over a corpus.
      alpha: of asvd.
    """

    start: Start = "principal"
    steps: int | None = None
    rate: float = 3e-3
    alpha: float = 0.5

    def __post_init__(self) -> None:
        if self.start not in get_args(Start):
            raise unknown("start of the factors", self.start, get_args(Start))

    @property
    def reads(self) -> bool:
        return True

    def fits(self, method: CacheMethod, dims: tuple[CacheDims, ...]) -> bool:
        return any_codec(method, LowRank, dims)

    def find(self, task: Task) -> Found:
        dims = model_dims(task.model, task.given.length)
        numbers, magnitudes = self._collect(task)
        layers, errors = [], []
        with task.track("factors", 2 * len(dims)) as advance:
            for layer, (codecs, pair, magnitude) in enumerate(
                zip(codecs_of(task.method, LowRank, dims), numbers, magnitudes, strict=True)
            ):
                made = []
                for name, codec, x in zip(("k", "v"), codecs, pair, strict=True):
                    factors = None
                    if codec is not None:
                        weights = None if self.start == "principal" else projection(task, layer, name)
                        factors = self._fit(codec, codec.rank(dims[layer]), x, weights, magnitude, task.seed)
                        errors.append(reconstruction_error(codec, factors, x))
                    made.append(factors)
                    advance()
                layers.append(LayerData(*made))
        return Found(task.method, tuple(layers), (f"rebuilt with {100 * np.mean(errors):.3g} % of the squares lost",))

    def _collect(self, task: Task) -> tuple[list[Pair], list[NDArray[np.float64]]]:
        """Per layer keys and values f32 [tokens, K, H], and the mean |x| of each channel of its input, [D]."""
        pieces, sums, count = [], None, 0
        with task.track("keys and values", task.steps) as advance:
            for tokens, lengths in task.given.batches(task.batch):
                seen = observe(task.model, _keys_and_values, tokens, lengths)
                exists = np.arange(tokens.shape[1]) < lengths[:, None]
                pieces.append([Pair(*(np.asarray(x, np.float32)[exists] for x in pair)) for pair, _ in seen])
                here = [np.asarray(total, np.float64) for _, total in seen]
                sums = here if sums is None else [a + b for a, b in zip(sums, here, strict=True)]
                count += int(lengths.sum())
                advance()
        joined = [Pair(*(np.concatenate(x) for x in zip(*layer, strict=True))) for layer in zip(*pieces, strict=True)]
        return joined, [total / count for total in sums or []]

    def _fit(
        self,
        codec: LowRank,
        rank: int,
        x: NDArray[np.float32],
        weights: NDArray[np.float32] | None,
        magnitude: NDArray[np.float64],
        seed: int,
    ) -> Factors:
        if weights is None:
            factors = principal_factors(np.einsum("tkh,tlj->khlj", x, x, optimize=True) / len(x), rank)
        elif self.start == "svd":
            factors = singular_factors(weights, rank)
        else:
            factors = activation_factors(weights, magnitude, rank, self.alpha)
        best = codec.inner == Identity() and self.start == "principal"
        steps = (0 if best else 200) if self.steps is None else self.steps
        return train_factors(codec, factors, x, steps=steps, rate=self.rate, seed=seed) if steps else factors


def projection(task: Task, layer: int, name: str) -> NDArray[np.float32]:
    """The weights [D, K, H] that make keys ('k') or values ('v') of a layer's input.

    Raises:
      UsageError: keys are not a linear map of the input alone.
    """
    config: TransformerConfig = task.model.config
    if config.qkv_bias or (config.qk_norm and name == "k"):
        raise UsageError(
            f"keys and values of model {task.model.name!r} are not its inputs times weights alone (there is a bias or "
            "a norm), so factors cannot come from the weights; start from 'principal'"
        )
    return np.asarray(task.model.params[f"layers_{layer}"]["attention"][name]["kernel"], np.float32)


def _keys_and_values(prompt: Prompt) -> tuple[Pair, Array]:
    """Keys before rotary embedding, values [B, T, K, H], and the sum of |x| over tokens, [D]."""
    step = prompt.step
    assert step.hidden is not None
    size = jnp.where(prompt.valid[..., None], jnp.abs(step.hidden.astype(jnp.float32)), 0.0)
    return Pair(step.keys, step.values), size.sum((0, 1))
