"""Codebooks and ranges of `NonUniform` (KVQuant): quantiles and k-means, weighted by squared gradients of the loss."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
from numpy.typing import NDArray

from kvjax.cache.codec import NonUniform
from kvjax.cache.codec.kmeans import Weighting, fit_non_uniform
from kvjax.cache.layer_cache import LayerData
from kvjax.cache.layout import CacheDims
from kvjax.cache.method import CacheMethod
from kvjax.calibration.finder import Found, Task
from kvjax.calibration.observe import Pair, model_dims, sensitivities
from kvjax.calibration.parts import any_codec, codecs_of

Floats = NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class Codebooks:
    """One backward pass per sample gives the Fisher diagonal F = (∂L/∂x)² of every key and value; then each is fitted.

    KVQuant (Hooper et al., 2024, arXiv:2401.18079, sections 3.1 to 3.3). The first tokens that the method keeps exactly
    count nowhere. Keys and values of all samples are held on the host, 16 bytes per token and channel; fewer samples
    take less.

    Attributes:
      weighting: 'range' weighs a number by F · s², s the width of its range (the paper's derivation), 'plain' by F
        alone (its released code).
      match_moments: Q-Norm, which the paper's final text has dropped; it helps at 2 bits.
      iterations: of k-means, at most.
    """

    weighting: Weighting = "range"
    match_moments: bool = False
    iterations: int = 50

    @property
    def reads(self) -> bool:
        return True

    def fits(self, method: CacheMethod, dims: tuple[CacheDims, ...]) -> bool:
        return any_codec(method, NonUniform, dims)

    def find(self, task: Task) -> Found:
        codecs = codecs_of(task.method, NonUniform, model_dims(task.model, task.given.length))
        numbers, fisher = collect(task)
        layers = []
        with task.track("codebooks", len(codecs)) as advance:
            for pair, x, weights in zip(codecs, numbers, fisher, strict=True):
                layers.append(LayerData(*(self._fit(*one) for one in zip(pair, x, weights, strict=True))))
                advance()
        return Found(task.method, tuple(layers))

    def _fit(self, codec: NonUniform | None, x: Floats, fisher: Floats) -> dict[str, Floats] | None:
        if codec is None:
            return None
        return fit_non_uniform(
            codec,
            x,
            fisher,
            weighting=self.weighting,
            match_moments=self.match_moments,
            iterations=self.iterations,
        )


def collect(task: Task) -> tuple[list[Pair], list[Pair]]:
    """Per layer the keys and values of all samples, f32 [tokens, K, H], and their squared gradients."""
    pieces: list[tuple[tuple[Pair, ...], tuple[Pair, ...]]] = []
    with task.track("gradients", task.steps) as advance:
        for tokens, lengths in task.given.batches(task.batch):
            places = np.arange(tokens.shape[1])
            counted = (places >= task.method.sinks) & (places < lengths[:, None])
            seen, gradients = jax.tree.map(
                lambda x, counted=counted: np.asarray(x, np.float32)[counted],
                sensitivities(task.model, tokens, lengths),
            )
            pieces.append((seen, jax.tree.map(np.square, gradients)))
            advance()
    joined = jax.tree.map(lambda *parts: np.concatenate(parts), *pieces)
    return list(joined[0]), list(joined[1])
