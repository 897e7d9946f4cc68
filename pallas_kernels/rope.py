"""Rotary position embedding (Su et al., 2021) as data: frequencies and one amplitude.

Every scaling rule (linear, dynamic, Llama 3, YaRN) is a choice of these two, so the kernels
and the cache need to know nothing else about it.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotate-half layout: channel i pairs with channel i + H/2.

    Attributes:
      inv_freq: f32 [H/2], radians per position.
      amplitude: f32 scalar that multiplies cos and sin (YaRN's attention factor; 1 elsewhere).
    """

    inv_freq: jax.Array
    amplitude: jax.Array

    def rotate(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """Rotates `x` [..., H] by `positions`, an integer array that broadcasts to x.shape[:-1].

        Computed in float32, returned in the dtype of `x`.
        """
        angles = positions.astype(jnp.float32)[..., None] * self.inv_freq
        cos, sin = jnp.cos(angles) * self.amplitude, jnp.sin(angles) * self.amplitude
        low, high = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1).astype(x.dtype)
