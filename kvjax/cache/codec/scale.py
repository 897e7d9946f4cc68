"""The bfloat16 scales and zero points of codecs: rounded so that the codes reach what they have to."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kvjax.typing import Array

LIMIT = 2.0**126
"""Largest magnitude that is coded; what lies beyond saturates, so that no step of decoding overflows float32."""

MIN_SCALE = 2.0**-125
"""Smallest scale of integers. Half of it is the least normal float32: what is smaller, a machine may flush to 0."""


def least_scale(step: Array, least: float = MIN_SCALE) -> Array:
    """The least bfloat16 scale that covers `step` (f32), up to the float32 rounding in `step` itself, and `least`.

    Compilers turn a division by a constant into a product, so a step that should be a bfloat16 may be a bit above it;
    without the slack it would be rounded up to the next one, and the codes would depend on the compiler.
    """
    return _round_up(jnp.maximum(step * (1.0 - 2.0**-22), least))


def round_down(x: Array) -> Array:
    """The largest bfloat16 that is at most `x` (float32, finite)."""
    return _directed(x, away=jnp.signbit(x))


def _round_up(x: Array) -> Array:
    """The least bfloat16 that is at least `x` (float32, finite)."""
    return _directed(x, away=~jnp.signbit(x))


def _directed(x: Array, away: Array) -> Array:
    """`x` cut to bfloat16, or the next bfloat16 away from 0 where that is inexact and `away` holds."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    inexact = (bits & 0xFFFF) != 0
    cut = (bits >> 16) + (inexact & away).astype(jnp.uint32)
    return jax.lax.bitcast_convert_type(cut.astype(jnp.uint16), jnp.bfloat16)
