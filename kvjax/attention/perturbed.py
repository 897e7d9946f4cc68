"""Noise on what heads read, while a model trains (PGQA: Khan et al., 2024, arXiv 2408.08454)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from kvjax.attention.base import attend
from kvjax.cache.step import Step
from kvjax.typing import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Perturbed:
    """Attention less noise of its own mean and spread; stands where a layer's cache does.

    The abstract of the paper subtracts noise from attention maps; its release from what heads have read, which is what
    this does, o - noise (`matched_noise`). Since the noise has the mean of what it is subtracted from, nothing is left
    of the mean over a head's tokens and channels. The release does this at evaluation too; here evaluation is without
    it where the caller leaves it away. Attention itself is any module's, in equal groups for PGQA.

    Attributes:
      key: PRNG key of this layer and call; the next state has another one.
      inner: what attends, such as `Bidirectional()` or a cache; None: tokens attend among themselves, causally.
    """

    key: Array
    inner: Any = None

    def step(self, step: Step) -> tuple[Array, Perturbed]:
        """As `LayerCacheProtocol.step`. Noise of padding is drawn, but does not count in the mean and spread."""
        out, inner = attend(step, self.inner)
        key, now = jax.random.split(self.key)
        heads, kv_heads = step.queries.shape[2], step.keys.shape[2]
        return out - matched_noise(now, out, step.valid, heads // kv_heads), Perturbed(key, inner)


def matched_noise(key: Array, out: Array, valid: Array, group: int) -> Array:
    """Noise with the mean and standard deviation of each head's output.

    A uniform number per head, token and channel, the same for all rows of the batch, is 0 on the diagonal: for head i
    of its group at channel i of the first token (channels counted through all tokens). It is then standardised over a
    head's tokens and channels, and given the output's own mean and (unbiased) standard deviation over the same.

    Args:
      out: [B, T, N, H]. valid: bool [B, T]; what is not valid counts in no mean.
      group: query heads of a kv head.

    Returns:
      [B, T, N, H] in the dtype of `out`; gradients flow through the output's moments, as released.
    """
    _, tokens, heads, dim = out.shape
    uniform = jax.random.uniform(key, (heads, tokens * dim))
    place = jnp.arange(heads)
    uniform = uniform.at[place, place % group].set(0.0, mode="drop")
    noise = jnp.moveaxis(uniform.reshape(heads, tokens, dim), 0, 1)[None]
    mean, deviation = _moments(out.astype(jnp.float32), valid)
    noise_mean, noise_deviation = _moments(noise, valid)
    standard = (noise - noise_mean) / jnp.where(noise_deviation > 0, noise_deviation, 1.0)
    return (standard * deviation + mean).astype(out.dtype)


def _moments(x: Array, valid: Array) -> tuple[Array, Array]:
    """Mean and unbiased standard deviation f32 [B, 1, N, 1] over valid tokens and channels of x [B or 1, T, N, H]."""
    seen = valid[:, :, None, None]
    count = jnp.maximum(seen.sum(1, keepdims=True) * x.shape[-1], 2)
    mean = jnp.sum(jnp.where(seen, x, 0.0), (1, 3), keepdims=True) / count
    variance = jnp.sum(jnp.where(seen, jnp.square(x - mean), 0.0), (1, 3), keepdims=True) / (count - 1)
    positive = variance > 0
    return mean, jnp.where(positive, jnp.sqrt(jnp.where(positive, variance, 1.0)), 0.0)
