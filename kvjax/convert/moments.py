"""Second moments of a layer's keys, as a cache holds them (rotated), and values: of sample texts, or of the weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from kvjax.cache.prompt import attend_prompt, rotate
from kvjax.cache.step import Step
from kvjax.convert.heads import Attention, Floats
from kvjax.errors import UsageError
from kvjax.models.config import RopeConfig, TransformerConfig
from kvjax.models.language_model import LanguageModel
from kvjax.models.transformer import Transformer
from kvjax.typing import Array, PyTree

Batch = tuple[NDArray[np.int32], NDArray[np.int32]]
POSITIONS = 4096
"""Positions at which keys of weights alone are turned, at most."""


class Moments(NamedTuple):
    """Sums of outer products over all heads of a token, [K, H, K, H]; only their proportions matter."""

    keys: Any
    values: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Summing:
    """A layer's cache that keeps nothing but the moments of what it is handed."""

    length: Array

    def step(self, step: Step) -> tuple[Array, Moments]:
        keys = rotate(step, step.keys.swapaxes(1, 2)).swapaxes(1, 2)
        sums = (_outer(jnp.where(step.valid[..., None, None], x, 0)) for x in (keys, step.values))
        return attend_prompt(step)[0], Moments(*sums)


def _outer(x: Array) -> Array:
    return jnp.einsum("btkh,btjc->khjc", x, x, precision="highest", preferred_element_type=jnp.float32)


def activation_moments(model: LanguageModel, batches: Iterable[Batch]) -> tuple[Moments, ...]:
    """Per layer, float64, summed batch by batch: nothing but the sums stays in memory.

    Args:
      batches: tokens int32 [B, T] and lengths int32 [B], of which each row has so many.

    Raises:
      UsageError: there are none.
    """
    total: tuple[Moments, ...] | None = None
    for tokens, lengths in batches:
        found = _moments(model.module, model.params, jnp.asarray(tokens), jnp.asarray(lengths))
        found = jax.tree.map(lambda x: np.asarray(x, np.float64), found)
        total = found if total is None else jax.tree.map(np.add, total, found)
    if total is None:
        raise UsageError("keys and values are those of sample texts, and none was given; give some text.")
    return total


@partial(jax.jit, static_argnames=("module",))
def _moments(module: Transformer, params: PyTree, tokens: Array, lengths: Array) -> tuple[Moments, ...]:
    empty = tuple(_Summing(jnp.zeros_like(lengths)) for _ in module.config.owners)
    valid = jnp.arange(tokens.shape[1]) < lengths[:, None]
    _, found = module.apply({"params": params}, tokens, cache=empty, valid=valid, logits_at=lengths - 1)
    return found  # pyright: ignore[reportReturnType]


def weight_moments(attention: Attention, config: TransformerConfig, layer: int) -> Moments:
    """Those of inputs whose channels are uncorrelated and of one size, at all positions of the context alike.

    Biases count as weights of an input that is always 1. Norms of keys are left out, but for their scales.
    """
    keys, values = (_rows(attention[part]) for part in ("k", "v"))
    if config.qk_norm:
        keys = keys * (attention["k_norm"]["scale"] + config.norm_offset)
    keys, values = (np.einsum("dkh,djc->khjc", x, x) for x in (keys, values))
    rope = config.rope_of(layer)
    return Moments(keys if rope is None else _turned(keys, rope, config.max_positions), values)


def _rows(projection: dict[str, Floats]) -> Floats:
    """The kernel [D, K, H], with the bias as one more row."""
    kernel = np.asarray(projection["kernel"], np.float64)
    return np.concatenate([kernel, projection["bias"][None]]) if "bias" in projection else kernel


def _turned(moments: Floats, rope: RopeConfig, length: int) -> Floats:
    """The mean over positions of R_p M R_pᵀ, where R_p turns channel i against channel i + H/2 in every head."""
    half = moments.shape[1] // 2
    frequencies = np.asarray(rope.table(2 * half, jnp.int32(length)).inv_freq, np.float64)
    angles = np.linspace(0, length - 1, min(length, POSITIONS)).round()[:, None] * frequencies
    cos, sin = np.cos(angles), np.sin(angles)
    cc, cs, sc, ss = ((a.T @ b / len(angles))[:, None] for a in (cos, sin) for b in (cos, sin))
    low, high = slice(None, half), slice(half, None)
    ll, lh, hl, hh = (moments[:, rows][..., columns] for rows in (low, high) for columns in (low, high))
    turned = np.empty_like(moments)
    turned[:, low, :, low] = cc * ll - cs * lh - sc * hl + ss * hh
    turned[:, low, :, high] = cs * ll + cc * lh - ss * hl - sc * hh
    turned[:, high, :, low] = sc * ll - ss * lh + cc * hl - cs * hh
    turned[:, high, :, high] = ss * ll + sc * lh + cs * hl + cc * hh
    return turned
