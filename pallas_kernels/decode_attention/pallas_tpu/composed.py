"""Formats around other formats: channels that are scaled, projected, corrected one by one, or stored in two arrays."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.decode_attention.pallas_tpu.lanes import columns, lane
from pallas_kernels.decode_attention.pallas_tpu.reader import Operand, Reader, Tile, own, paired
from pallas_kernels.decode_attention.pallas_tpu.unit import bfloat16_pair, dot
from pallas_kernels.rows import LANES


@dataclasses.dataclass(frozen=True)
class Composed(Reader):
    """What is decoded, changed and multiplied.

    Attributes:
      inner: reader of the format inside.
    """

    inner: Reader = Reader(jnp.float32, 0)

    @property
    def tile(self) -> int:
        return self.inner.tile

    @property
    def terms(self) -> int:
        return 2

    @property
    def decodes(self) -> bool:
        return True

    def _inside(self, operand: Any, row: int, head: int) -> Tile:
        return self.inner.decode(Operand(operand.loader.inner, operand.constants[1]), row, head)


@dataclasses.dataclass(frozen=True)
class Scaled(Composed):
    """Channels with a scale and an offset of their own, decoded for what is around them."""

    def constants(self, loader: Any) -> Any:
        """Scale and offset of every lane, f32 [K or 1, 2, planes · padded]."""
        scale = loader.scale.astype(jnp.float32)
        offset = jnp.zeros_like(scale) if loader.offset is None else loader.offset.astype(jnp.float32)
        both = jnp.stack(jnp.broadcast_arrays(scale, offset), axis=1)
        return both[..., self.channels], self.inner.constants(loader.inner)

    def decode(self, operand: Any, row: int, head: int) -> Tile:
        table, inner = operand.constants[0], self._inside(operand, row, head)
        index = head if table.shape[0] > 1 else 0

        def tile(t: int) -> list[jax.Array]:
            lanes = [slice(i * self.padded, i * self.padded + self.lanes) for i in range(self.planes)]
            return [x * table[index, 0:1, at] + table[index, 1:2, at] for x, at in zip(inner(t), lanes, strict=True)]

        return tile


@dataclasses.dataclass(frozen=True)
class Projected(Composed):
    """Channels that are made of latents, decoded for what is around them; one slot per row."""

    def constants(self, loader: Any) -> Any:
        """The projection [K or 1, r, H]."""
        return loader.up, self.inner.constants(loader.inner)

    def decode(self, operand: Any, row: int, head: int) -> Tile:
        ups, inner = operand.constants[0], self._inside(operand, row, head)
        up = ups[head if ups.shape[0] > 1 else 0]
        terms = [up] if up.dtype == jnp.bfloat16 else bfloat16_pair(up.astype(jnp.float32))

        def tile(t: int) -> list[jax.Array]:
            total: Any = 0.0
            for i, x in enumerate(inner(t)):
                own = slice(i * self.inner.width, (i + 1) * self.inner.width)
                for part in [x.astype(jnp.bfloat16)] if self.inner.terms == 1 else bfloat16_pair(x):
                    for term in terms:
                        total = total + dot(part, term[own])
            return [total]

        return tile


@dataclasses.dataclass(frozen=True)
class Corrected(Composed):
    """Slots with a few elements that are stored by themselves and added."""

    def constants(self, loader: Any) -> Any:
        """The number of each head's first channel, f32 [K or 1, 1, 128]."""
        first = jnp.zeros(1) if loader.first is None else loader.first.astype(jnp.float32)
        return jnp.broadcast_to(first[:, None, None], (len(first), 1, LANES)), self.inner.constants(loader.inner)

    def read(self, operand: Any, row: int, head: int) -> list[list[jax.Array]]:
        return paired(self.decode(operand, row, head), operand.loader.index[0].shape[2] // (LANES * self.fold))

    def decode(self, operand: Any, row: int, head: int) -> Tile:
        loader, firsts, inner = operand.loader, operand.constants[0], self._inside(operand, row, head)
        first = firsts[head if firsts.shape[0] > 1 else 0]
        pairs = [[_of_head(ref, row, head) for ref in pair] for pair in zip(loader.index, loader.value, strict=True)]

        def tile(t: int) -> list[jax.Array]:
            def laid_out(x: jax.Array, less: Any = 0.0) -> jax.Array:
                starts = [(t * self.fold + c) * LANES for c in range(self.fold)]
                return columns(lambda c: x[:, starts[c] : starts[c] + LANES] - less, self.fold, self.width)

            planes = inner(t)
            for index, value in pairs:
                channel, more = laid_out(index, first), laid_out(value)
                for i, x in enumerate(planes):
                    here = lane(x.shape) % self.width + i * self.width
                    planes[i] = x + jnp.where(channel == here.astype(jnp.float32), more, 0.0)
            return planes

        return tile


@dataclasses.dataclass(frozen=True)
class Joined(Reader):
    """The channels of several plain arrays of one type, side by side.

    Attributes:
      turns: of each array, whether its channels do not fill the lanes. XLA lays such a one out with slots along them.
    """

    turns: tuple[bool, ...] = ()

    def turned(self, loader: Any) -> Any:
        return jax.tree.unflatten(jax.tree.structure(loader.slots), self.turns)

    def read(self, operand: Any, row: int, head: int) -> list[list[jax.Array]]:
        refs = [part.x for part in operand.loader.parts]
        parts = [x[row, own(x, head)] for x in refs]
        parts = [x.T if turn else x for x, turn in zip(parts, self.turns, strict=True)]
        return [[jnp.concatenate(parts, axis=1)]]


def _of_head(ref: Any, row: int, head: int) -> jax.Array:
    """f32 [1, block] of a reference [rows of the step, kv heads of the step or 1, block]."""
    x, index = ref[row], own(ref, head)
    x = x.astype(jnp.int32) if jnp.issubdtype(x.dtype, jnp.integer) else x
    return x.astype(jnp.float32)[index : index + 1]
