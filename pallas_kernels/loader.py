"""Loaders: how a kernel reads keys or values out of their stored format.

A loader is a pytree. Its *slots* are the leaves that grow with the number of tokens: they lead with [..., M], M blocks
of `block` slots, and [...] is [B, K or 1] where a user makes one (head axis 1 = shared by all kv heads). Everything
else in a loader is shared by all slots. An implementation cuts rows, heads and runs of blocks out of `slots` and
reads what is left: `with_slots(cut).dot(queries)`. S = M · block everywhere.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp

from pallas_kernels.packing import unpack_planes
from pallas_kernels.rope import Rope

PyTree = Any


def _static() -> Any:
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
        """The leaves [..., M, ...] that grow with the number of tokens."""

    @abc.abstractmethod
    def with_slots(self, slots: PyTree) -> Self:
        """This loader over other leaves of the structure of `slots`."""

    @abc.abstractmethod
    def decode(self) -> jax.Array:
        """f32 [..., S, H]."""

    @property
    def reads_in_place(self) -> bool:
        """Whether `dot` and `mix` need no decoded copy of what they read."""
        return False

    def dot(self, queries: jax.Array) -> jax.Array:
        """f32 [..., R, S]: inner products of `queries` f32 [..., R, H] with the slots."""
        return _dot(queries, self.decode())

    def mix(self, weights: jax.Array, valid: jax.Array | None) -> jax.Array:
        """f32 [..., R, H]: the slots summed with `weights` f32 [..., R, S].

        Weights are 0 where `valid` bool [..., S] is False; what such a slot holds, NaN included, adds nothing. With
        None all slots are taken to be finite.
        """
        values = self.decode()
        return _mix(weights, values if valid is None else jnp.where(valid[..., None], values, 0.0))


def _dot(queries: jax.Array, keys: jax.Array) -> jax.Array:
    return jnp.einsum("...rh,...sh->...rs", queries, keys, preferred_element_type=jnp.float32)


def _mix(weights: jax.Array, values: jax.Array) -> jax.Array:
    return jnp.einsum("...rs,...sh->...rh", weights, values, preferred_element_type=jnp.float32)


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

    def with_slots(self, slots: PyTree) -> DenseLoader:
        return DenseLoader(slots)

    def decode(self) -> jax.Array:
        return self.x.astype(jnp.float32)

    @property
    def reads_in_place(self) -> bool:
        return self.x.dtype in (jnp.float32, jnp.bfloat16)

    def dot(self, queries: jax.Array) -> jax.Array:
        return self._exact(_dot, queries)

    def mix(self, weights: jax.Array, valid: jax.Array | None) -> jax.Array:
        return self._exact(_mix, weights) if valid is None else super().mix(weights, valid)

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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class IntegerLoader(Loader):
    """Packed codes of 8, 4 or 2 bits with affine scales: x = code * scale + zero.

    Attributes:
      codes: uint8 [..., M, block, H·bits/8], planes as in `packing`.
      scale: floating, [..., M, block, C] (per token and channel group) or [..., M, 1, C] (per block and channel
        group); C divides H and each of the C groups holds H/C neighbouring channels.
      zero: as `scale`; None for symmetric codes, whose zero is -2**(bits - 1) * scale.
      bits: bits per code.
    """

    codes: jax.Array
    scale: jax.Array
    zero: jax.Array | None
    bits: int = _static()

    @property
    def block(self) -> int:
        return self.codes.shape[-2]

    @property
    def head_dim(self) -> int:
        return self.codes.shape[-1] * 8 // self.bits

    @property
    def slots(self) -> PyTree:
        return self.codes, self.scale, self.zero

    def with_slots(self, slots: PyTree) -> IntegerLoader:
        return IntegerLoader(*slots, bits=self.bits)

    def decode(self) -> jax.Array:
        return jnp.concatenate(self._planes(), axis=-1)

    def dot(self, queries: jax.Array) -> jax.Array:
        planes = self._planes()
        parts = jnp.split(queries, len(planes), axis=-1)
        return sum(
            (_dot(q, plane) for q, plane in zip(parts[1:], planes[1:], strict=True)), start=_dot(parts[0], planes[0])
        )

    def mix(self, weights: jax.Array, valid: jax.Array | None) -> jax.Array:
        # A code is always finite, so only scales and zeros of invalid slots have to be silenced.
        seen = None if valid is None else valid.reshape(*valid.shape[:-1], -1, self.block)
        if seen is not None and self.scale.shape[-2] == 1:
            seen = jnp.any(seen, axis=-1, keepdims=True)
        return jnp.concatenate([_mix(weights, plane) for plane in self._planes(seen)], axis=-1)

    def _planes(self, seen: jax.Array | None = None) -> list[jax.Array]:
        """Decoded channels of each plane, f32 [..., S, P]; scales where `seen` is False count as 0."""
        scale = self.scale.astype(jnp.float32)
        zero = scale * -(2.0 ** (self.bits - 1)) if self.zero is None else self.zero.astype(jnp.float32)
        if seen is not None:
            scale, zero = (jnp.where(seen[..., None], x, 0.0) for x in (scale, zero))
        group = self.head_dim // scale.shape[-1]
        scale, zero = (jnp.repeat(x, group, axis=-1) if x.shape[-1] > 1 else x for x in (scale, zero))
        planes = unpack_planes(self.codes, self.bits)
        width = self.codes.shape[-1]

        def cut(x: jax.Array, index: int) -> jax.Array:
            return x if x.shape[-1] == 1 else x[..., index * width : (index + 1) * width]

        decoded = [p.astype(jnp.float32) * cut(scale, i) + cut(zero, i) for i, p in enumerate(planes)]
        return [_flat(x) for x in decoded]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RotatedLoader(Loader):
    """Keys that are stored before rotary embedding and rotated when they are read.

    Attributes:
      inner: loader of the unrotated keys.
      positions: int32 [..., S], one per slot; a head axis of 1 shares them, and the rotation's cost, among heads.
      rope: the rotary table.
    """

    inner: Loader
    positions: jax.Array
    rope: Rope

    @property
    def block(self) -> int:
        return self.inner.block

    @property
    def head_dim(self) -> int:
        return self.inner.head_dim

    @property
    def slots(self) -> PyTree:
        return self.inner.slots, self.positions.reshape(*self.positions.shape[:-1], -1, self.block)

    def with_slots(self, slots: PyTree) -> RotatedLoader:
        inner, positions = slots
        return RotatedLoader(self.inner.with_slots(inner), _flat(positions, axes=2), self.rope)

    def decode(self) -> jax.Array:
        return self.rope.rotate(self.inner.decode(), self.positions)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockLoader(Loader):
    """Any format that can decode a run of its blocks; needs no kernel of its own.

    Attributes:
      store: pytree of leaves [..., M, ...].
      decode_store: static and hashable; store -> [..., S, H]. A frozen codec's bound `decode` is one.
      width: channels H.
      size: slots per block.
    """

    store: PyTree
    decode_store: Callable[[PyTree], jax.Array] = _static()
    width: int = _static()
    size: int = _static()

    @property
    def block(self) -> int:
        return self.size

    @property
    def head_dim(self) -> int:
        return self.width

    @property
    def slots(self) -> PyTree:
        return self.store

    def with_slots(self, slots: PyTree) -> BlockLoader:
        return dataclasses.replace(self, store=slots)

    def decode(self) -> jax.Array:
        return self.decode_store(self.store).astype(jnp.float32)


def _flat(x: jax.Array, axes: int = 3) -> jax.Array:
    """Joins the block axis and the one behind it: [..., M, block, P] -> [..., S, P], or without P for `axes` 2."""
    split = x.ndim - axes
    return x.reshape(*x.shape[:split], x.shape[split] * x.shape[split + 1], *x.shape[split + 2 :])
