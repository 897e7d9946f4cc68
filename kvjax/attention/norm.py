"""Root-mean-square norm (Zhang and Sennrich, 2019, arXiv 1910.07467)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from kvjax.typing import Array


class RMSNorm(nn.Module):
    """x / rms(x) * (offset + scale) over the last axis, computed in float32, returned in the dtype of x.

    Attributes:
      eps: added to the mean square.
      offset: 0, or 1 for models that store the scale's distance from one (Gemma).
      dtype: of the parameter `scale` [D] at initialisation.
    """

    eps: float = 1e-6
    offset: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.constant(1.0 - self.offset), (x.shape[-1],), self.dtype)
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return (normed * (scale.astype(jnp.float32) + self.offset)).astype(x.dtype)
