"""How the next token is chosen from logits."""

from __future__ import annotations

import dataclasses
import math
from numbers import Real

import jax
import jax.numpy as jnp

from kvjax.errors import UsageError
from kvjax.typing import Array


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Greedy at temperature 0, otherwise a draw from the logits that top_k and top_p leave.

    Attributes:
      temperature: divides the logits; 0 takes the largest.
      top_k: keep the k largest, or None.
      top_p: keep the smallest set whose probability reaches p (Holtzman et al., 2020), or None.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        temperature, top_k, top_p = self.temperature, self.top_k, self.top_p
        if not (isinstance(temperature, Real) and 0 <= temperature < math.inf):
            raise UsageError(f"temperature is a finite number of at least 0 (0 is greedy); got {temperature!r}")
        if not (top_k is None or (isinstance(top_k, int) and top_k >= 1)):
            raise UsageError(f"top_k is a whole number of at least 1, or None; got {top_k!r}")
        if not (top_p is None or (isinstance(top_p, Real) and 0 < top_p <= 1)):
            raise UsageError(f"top_p is in (0, 1], or None; got {top_p!r}")

    def sample(self, logits: Array, key: Array) -> Array:
        """int32 [B] from f32 [B, V]."""
        if self.temperature == 0:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        logits = logits / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            least = jax.lax.top_k(logits, self.top_k)[0][..., -1:]
            logits = jnp.where(logits < least, -jnp.inf, logits)
        if self.top_p is not None:
            logits = jnp.where(self._outside_top_p(logits, self.top_p), -jnp.inf, logits)
        return jax.random.categorical(key, logits).astype(jnp.int32)

    @staticmethod
    def _outside_top_p(logits: Array, top_p: float) -> Array:
        order = jnp.argsort(-logits, axis=-1)
        p = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1))
        outside = jnp.cumsum(p, axis=-1) - p >= top_p
        return jnp.take_along_axis(outside, jnp.argsort(order, axis=-1), axis=-1)
