"""Keep what queries still to come are expected to look at."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from kvjax.cache.policy.base import Policy
from kvjax.cache.policy.seen import Prompt, Slots
from kvjax.cache.prompt import group_filled
from kvjax.errors import UsageError
from kvjax.typing import Array
from pallas_kernels.rope import Rope


@dataclasses.dataclass(frozen=True)
class ExpectedAttention(Policy):
    """The expectation of exp(q·k) for normal queries (Devoto et al., 2025, "Expected Attention", arXiv 2510.00636).

    Mean m and covariance C of each query head are taken from the prompt's unrotated queries behind the first `sinks`,
    and rotated by R, the mean of the rotary matrices of the next `ahead` positions. With m' = R m and C' = R C R^T,
    z_j = scale m'·k_j + scale^2 k_j^T C' k_j / 2; softmax of z over the keys behind the sinks; mean over the query
    heads of a kv head; (that + epsilon) · |v_j|. The sinks score above all others.

    Attributes:
      ahead: positions behind the row's prompt that R averages over.
      sinks: first tokens, left out of the moments and of the softmax.
      epsilon: 0 as a rule; where softmax saturates it decides by |v| (1e-2 with budgets that differ between heads).
      covariance: False takes the mean only.
    """

    online: ClassVar[bool] = False

    ahead: int = 512
    sinks: int = 4
    epsilon: float = 0.0
    covariance: bool = True

    def __post_init__(self) -> None:
        if self.ahead < 1 or self.sinks < 0 or self.epsilon < 0:
            raise UsageError(f"ExpectedAttention needs ahead >= 1, sinks >= 0 and epsilon >= 0; got {self}")

    def prompt_scores(self, prompt: Prompt) -> Array:
        counted = (prompt.valid & (prompt.positions >= self.sinks))[:, None]  # [B, 1, T]
        keys = jnp.where(counted[..., None], prompt.keys, 0).astype(jnp.float32)
        rotation = AverageRotation.of(prompt.step.rope, prompt.lengths, self.ahead)
        filled = jnp.asarray(group_filled(prompt.step))

        def of_head(total: Array, head: tuple[Array, Array]) -> tuple[Array, None]:
            queries, exists = head  # [B, K, T, H] unrotated, bool [1 or B, K]
            z = self._exponent(queries, keys, counted, rotation, prompt.step.scale)
            p = jax.nn.softmax(jnp.where(counted, z, -jnp.inf), axis=-1, where=counted)
            return total + jnp.where(exists[..., None], p, 0.0), None

        zero = jnp.zeros(keys.shape[:3], jnp.float32)
        queries = jnp.moveaxis(prompt.unrotated_queries, 2, 0)
        total, _ = jax.lax.scan(of_head, zero, (queries, jnp.moveaxis(filled, 2, 0)))
        mean = total / jnp.maximum(filled.sum(-1), 1)[..., None]
        scores = (mean + self.epsilon) * jnp.linalg.norm(prompt.values.astype(jnp.float32), axis=-1)
        scores = jnp.where(counted, scores, 0.0)
        return jnp.where(counted, scores, scores.max(-1, keepdims=True) + 1.0)

    def _exponent(self, queries: Array, keys: Array, counted: Array, rotation: AverageRotation, scale: float) -> Array:
        """z f32 [B, K, T] of one query head per kv head: queries, keys [B, K, T, H]; counted bool [B, 1, T]."""
        many = jnp.maximum(counted.sum(-1), 1)[..., None].astype(jnp.float32)  # [B, 1, 1]
        queries = jnp.where(counted[..., None], queries, 0).astype(jnp.float32)
        mean = queries.sum(2) / many
        z = scale * jnp.einsum("bkth,bkh->bkt", keys, rotation.turn(mean))
        if not self.covariance:
            return z
        centred = jnp.where(counted[..., None], queries - mean[:, :, None], 0.0)
        covariance = jnp.einsum("bkti,bktj->bkij", centred, centred) / many[..., None]
        turned = rotation.turn(rotation.turn(covariance).swapaxes(-1, -2))
        return z + 0.5 * scale**2 * jnp.einsum("bkti,bkij,bktj->bkt", keys, turned, keys, optimize="optimal")

    def slot_scores(self, slots: Slots) -> Array:
        raise UsageError("ExpectedAttention scores a prompt by its own queries; decoded tokens do not compete")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AverageRotation:
    """The mean of rotary matrices over a range of positions: cos, sin f32 [B, H/2], or None where nothing rotates."""

    cos: Array | None
    sin: Array | None

    @classmethod
    def of(cls, rope: Rope | None, start: Array, count: int) -> AverageRotation:
        """Over `count` positions from start int32 [B]."""
        if rope is None:
            return cls(None, None)
        positions = (start[:, None] + jnp.arange(count, dtype=jnp.int32)).astype(jnp.float32)
        angles = positions[..., None] * rope.inv_freq
        return cls(jnp.cos(angles).mean(1) * rope.amplitude, jnp.sin(angles).mean(1) * rope.amplitude)

    def turn(self, x: Array) -> Array:
        """R x for vectors x [B, ..., H], of which the last channels are rotated."""
        if self.cos is None or self.sin is None:
            return x
        fixed, x = jnp.split(x, [x.shape[-1] - 2 * self.cos.shape[-1]], axis=-1)
        cos, sin = (y.reshape(y.shape[0], *(1,) * (x.ndim - 2), y.shape[-1]) for y in (self.cos, self.sin))
        low, high = jnp.split(x, 2, axis=-1)
        return jnp.concatenate([fixed, low * cos - high * sin, high * cos + low * sin], axis=-1)
