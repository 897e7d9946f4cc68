"""Perplexity of windows of text read without a cache, with bootstrap intervals (Efron, 1979)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from kvjax.errors import UsageError
from kvjax.evaluation.summary import Estimate
from kvjax.models.language_model import LanguageModel
from kvjax.models.transformer import Transformer
from kvjax.typing import Array, PyTree

DRAWS = 2000


@dataclasses.dataclass(frozen=True, eq=False)
class Surprisal:
    """Of one model: float64 [n], nats of each window summed over its tokens behind the first, and their numbers."""

    nats: NDArray[np.float64]
    tokens: NDArray[np.float64]

    @property
    def perplexity(self) -> float:
        """Of all tokens together."""
        return math.exp(self.nats.sum() / self.tokens.sum())


def read_windows(model: LanguageModel, batches: Iterable[tuple[NDArray[np.int32], NDArray[np.int32]]]) -> Surprisal:
    """How surprised the model is by batches of windows: tokens int32 [B, T], lengths int32 [B]."""
    found = [_nats(model.module, model.params, jnp.asarray(tokens), jnp.asarray(n)) for tokens, n in batches]
    nats, counts = (np.concatenate([np.asarray(x, np.float64) for x in part]) for part in zip(*found, strict=True))
    return Surprisal(nats, counts)


def perplexity(read: Surprisal, seed: int = 0) -> Estimate:
    """With the 95 % interval over windows that are drawn again with replacement."""
    return Estimate(read.perplexity, *map(math.exp, _interval(_means(read, _drawn(len(read.nats), seed)))))


def ratio(read: Surprisal, other: Surprisal, seed: int = 0) -> Estimate:
    """The perplexity of one over that of another on the same windows; both are drawn again together.

    Raises:
      UsageError: the windows are not the same.
    """
    if not np.array_equal(read.tokens, other.tokens):
        raise UsageError("two models are compared on the same windows of text; these have other lengths.")
    drawn = _drawn(len(read.nats), seed)
    low, high = _interval(_means(read, drawn) - _means(other, drawn))
    return Estimate(read.perplexity / other.perplexity, math.exp(low), math.exp(high))


@partial(jax.jit, static_argnames=("module",))
def _nats(module: Transformer, params: PyTree, tokens: Array, lengths: Array) -> tuple[Array, Array]:
    valid = jnp.arange(tokens.shape[1]) < lengths[:, None]
    logits, _ = module.apply({"params": params}, tokens, valid=valid)  # pyright: ignore[reportGeneralTypeIssues]
    surprisal = -jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], axis=-1)[..., 0]
    return jnp.where(valid[:, 1:], surprisal, 0.0).sum(1), valid[:, 1:].sum(1)


def _drawn(count: int, seed: int) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, count, (DRAWS, count))


def _means(read: Surprisal, drawn: NDArray[np.int64]) -> NDArray[np.float64]:
    return read.nats[drawn].sum(1) / read.tokens[drawn].sum(1)


def _interval(values: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)
