"""Loaders: how a kernel reads keys or values out of their stored format.

A loader is a pytree. Its *slots* are the leaves that grow with the number of tokens. They lead with [..., n], n
entries for the S slots in their order: one per slot, one per block of `block` slots (M of them), or one per row of
`Rows`. [...] is [B, K or 1] where a user makes one (head axis 1 = shared by all kv heads). Everything else in a
loader is shared by all slots. An implementation cuts rows, heads and runs of `granularity` blocks out of `slots` and
reads what is left: `with_slots(cut).dot(queries)`. S = M · block everywhere.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp

PyTree = Any


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
        """This loader over other leaves of the structure of `slots`."""

    @abc.abstractmethod
    def decode(self) -> jax.Array:
        """f32 [..., S, H]."""

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
    return jnp.einsum("...rh,...sh->...rs", queries, keys, preferred_element_type=jnp.float32)


def mix(weights: jax.Array, values: jax.Array) -> jax.Array:
    return jnp.einsum("...rs,...sh->...rh", weights, values, preferred_element_type=jnp.float32)
