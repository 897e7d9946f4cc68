"""Loaders: how a kernel reads keys or values out of their stored format.

A loader is a pytree. Its *slots* are the leaves that grow with the number of tokens. They lead with [..., n], n
entries for the S slots in their order: one per slot, one per block of `block` slots (M of them), or one per row of
`Rows`. [...] is [B, K or 1] where a user makes one (head axis 1 = shared by all kv heads). Everything else in a
loader is shared by all slots and rows; what differs among heads (`per_head`) leads with [K or 1]. An implementation
cuts rows, heads and runs of `granularity` blocks out of `slots` and reads what is left:
`with_slots(cut).dot(queries)`. S = M · block everywhere.

Some formats store other channels than attention sees: scaled ones, or a few from which many are made. Such a map is
linear, so it can be applied to the queries and to the sums instead of the slots. Implementations read the `core`, whose
channels are the stored ones:

    queries, bias = loader.to_core(queries);  dot = loader.core.dot(queries) + bias
    mix = loader.from_core(loader.core.mix(weights, valid), total=sum of the weights)
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp

PyTree = Any

FEW_QUERIES = 16
"""Queries of one head up to which a CPU takes less time to transpose their products than to rearrange the keys."""


def static() -> Any:
    return dataclasses.field(metadata={"static": True})


class Loader(abc.ABC):
    """Reads one stored format. `decode` defines it; `dot` and `mix` may know the format better."""

    @property
    @abc.abstractmethod
    def block(self) -> int:
        """Slots per block."""

    @property
    @abc.abstractmethod
    def head_dim(self) -> int:
        """Channels H of a decoded slot."""

    @property
    @abc.abstractmethod
    def slots(self) -> PyTree:
        """The leaves [..., n, ...] that grow with the number of tokens."""

    @property
    @abc.abstractmethod
    def count(self) -> int:
        """S."""

    @abc.abstractmethod
    def with_slots(self, slots: PyTree) -> Self:
        """This loader over other leaves of the structure of `slots`, floating ones perhaps widened to float32."""

    @abc.abstractmethod
    def decode(self) -> jax.Array:
        """f32 [..., S, H]."""

    @property
    def per_head(self) -> PyTree:
        """The leaves [K or 1, ...] that belong to heads and are needed to read `slots`; None where there are none."""
        return None

    @property
    def core(self) -> Loader:
        """The loader of the stored channels; itself, where these are the channels that attention sees."""
        return self

    def to_core(self, queries: jax.Array) -> tuple[jax.Array, jax.Array | float]:
        """For queries f32 [..., K, R, H]: those of the core, [..., K, R, C], and what each adds to all its products.

        The second is f32 [..., K, R, 1] or 0.
        """
        return queries, 0.0

    def from_core(self, sums: jax.Array, total: jax.Array) -> jax.Array:
        """f32 [..., K, R, H] from the core's sums [..., K, R, C]; total [..., K, R, 1] is the sum of the weights."""
        return sums

    @property
    def granularity(self) -> int:
        """Blocks in the smallest piece that can be cut out of `slots`."""
        return 1

    @property
    def reads_in_place(self) -> bool:
        """Whether `dot` and `mix` need no decoded copy of what they read."""
        return False

    def dot(self, queries: jax.Array) -> jax.Array:
        """f32 [..., R, S]: inner products of `queries` f32 [..., R, H] with the slots."""
        return dot(queries, self.decode())

    def mix(self, weights: jax.Array, valid: jax.Array | None) -> jax.Array:
        """f32 [..., R, H]: the slots summed with `weights` f32 [..., R, S].

        Weights are 0 where `valid` bool [..., S] is False; what such a slot holds, NaN included, adds nothing. With
        None all slots are taken to be finite.
        """
        values = self.decode()
        return mix(weights, values if valid is None else jnp.where(valid[..., None], values, 0.0))


def dot(queries: jax.Array, keys: jax.Array) -> jax.Array:
    if queries.shape[-2] > FEW_QUERIES or jax.default_backend() != "cpu":
        return jnp.einsum("...rh,...sh->...rs", queries, keys, preferred_element_type=jnp.float32)
    # XLA on a CPU packs the right operand of a product: it should be the few queries, not the many keys. Without the
    # barrier it exchanges the operands to save the transposition.
    products = jnp.einsum("...sh,...rh->...sr", keys, queries, preferred_element_type=jnp.float32)
    return jnp.swapaxes(jax.lax.optimization_barrier(products), -1, -2)


def mix(weights: jax.Array, values: jax.Array) -> jax.Array:
    return jnp.einsum("...rs,...sh->...rh", weights, values, preferred_element_type=jnp.float32)
