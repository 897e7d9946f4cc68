"""Uncoded slots."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.loader.base import Loader, PyTree, dot, mix


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DenseLoader(Loader):
    """Uncoded slots.

    Attributes:
      x: [..., S, H] of any floating dtype; a block is one slot.
    """

    x: jax.Array

    @property
    def block(self) -> int:
        return 1

    @property
    def head_dim(self) -> int:
        return self.x.shape[-1]

    @property
    def slots(self) -> PyTree:
        return self.x

    @property
    def count(self) -> int:
        return self.x.shape[-2]

    def with_slots(self, slots: PyTree) -> DenseLoader:
        return DenseLoader(slots)

    def decode(self) -> jax.Array:
        return self.x.astype(jnp.float32)

    @property
    def reads_in_place(self) -> bool:
        return self.x.dtype in (jnp.float32, jnp.bfloat16)

    def dot(self, queries: jax.Array) -> jax.Array:
        return self._exact(dot, queries)

    def mix(self, weights: jax.Array, valid: jax.Array | None) -> jax.Array:
        return self._exact(mix, weights) if valid is None else super().mix(weights, valid)

    def _exact(self, product: Callable[[jax.Array, jax.Array], jax.Array], left: jax.Array) -> jax.Array:
        """`product(left, x)` in float32 precision without a float32 copy of `x`.

        A float32 is the sum of three bfloat16 numbers, whose products with a bfloat16 are exact in float32; so the
        small operand is split, and the large one is read as it lies.
        """
        if self.x.dtype != jnp.bfloat16:
            return product(left, self.decode())
        rows = left.shape[-2]
        out = product(jnp.concatenate(_bfloat16_terms(left), axis=-2), self.x)
        return sum((out[..., i * rows : (i + 1) * rows, :] for i in (1, 2)), start=out[..., :rows, :])


def _bfloat16_terms(x: jax.Array) -> list[jax.Array]:
    """Three bfloat16 arrays whose sum is `x` (float32)."""
    terms = []
    for _ in range(3):
        # Not a cast to and fro, which compilers may remove as excess precision.
        term = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
        terms.append(term.astype(jnp.bfloat16))
        x = x - term
    return terms
