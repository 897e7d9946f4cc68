"""What the kernel must know of a format: how a block of slots becomes large operands of the matrix unit.

A reader holds the static facts of a loader. Inside the kernel it is handed the loader again, with references to a block
in place of arrays: [rows of the step, kv heads of the step or 1, entries, ...].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.decode_attention.pallas_tpu.lanes import columns, lane, up
from pallas_kernels.loader import Loader
from pallas_kernels.rows import LANES


@dataclasses.dataclass(frozen=True)
class Reader:
    """Slots of a plain array, and what all readers have in common.

    Attributes:
      unit: dtype of the large operand.
      dim: channels H.
      fold: slots that share a row.
      planes: large operands per block; plane i holds channels i · width and on.
      groups: arrays of factors and of summands per slot, one per group of H / groups channels; 0: none.
    """

    unit: Any
    dim: int
    fold: int = 1
    planes: int = 1
    groups: int = 0

    @property
    def width(self) -> int:
        """Channels of a plane."""
        return self.dim // self.planes

    @property
    def lanes(self) -> int:
        """Lanes of a plane."""
        return self.fold * self.width

    @property
    def padded(self) -> int:
        """The same, in whole vector registers."""
        return up(self.lanes, LANES)

    def planes_of(self, group: int) -> range:
        """Planes that hold channels of a group."""
        size = self.dim // max(1, self.groups)
        return range(group * size // self.width, -(-(group + 1) * size // self.width))

    def group_of_lane(self, plane: int, rows: int) -> jax.Array:
        """int32 [rows, lanes]: the group of each lane's channel."""
        channel = plane * self.width + lane((rows, self.lanes)) % self.width
        return channel // (self.dim // max(1, self.groups))

    def constants(self, loader: Loader) -> tuple[jax.Array, ...]:
        """Small arrays that the kernel needs beside the slots."""
        return ()

    def scratch(self, block: int, rows: int, heads: int) -> tuple[tuple[tuple[int, ...], Any], ...]:
        """Shape and dtype of what `prepare` writes, for a step of some rows of the batch and kv heads."""
        return ()

    def prepare(self, operand: Any) -> None:
        """What is done once for all heads of a block."""

    @property
    def has_summand(self) -> bool:
        return False

    @property
    def bytes_per_slot(self) -> float:
        """What a slot of one head takes in vector memory."""
        return self.planes * self.padded / self.fold * jnp.dtype(self.unit).itemsize

    def affine(self, loader: Any, row: int, group: int) -> tuple[jax.Array, jax.Array | None]:
        """Factor and summand f32 [kv heads of the step or 1, block] of each slot; see `Integer`."""
        raise NotImplementedError

    @property
    def decodes(self) -> bool:
        """Whether slots become other numbers before they are multiplied."""
        return False

    def read(self, operand: Any, row: int, head: int) -> list[list[jax.Array]]:
        """The planes of one head, each as arrays [block / fold, lanes] whose sum it is."""
        x = operand.loader.x
        return [[x[row, own(x, head)]]]

    def decode(self, loader: Any, row: int, head: int) -> Callable[[int], list[jax.Array]]:
        """A function that gives tile t of the same planes as numbers f32 [128, lanes], scales included."""
        x = loader.x
        return lambda t: [x[row, own(x, head), t * LANES : (t + 1) * LANES].astype(jnp.float32)]


@dataclasses.dataclass(frozen=True)
class Integer(Reader):
    """Integer codes w with a factor and a summand per slot: x = w · factor + summand.

    Attributes:
      bits: as in the loader.
      symmetric: codes without zero points.
    """

    bits: int = 8
    symmetric: bool = False

    @property
    def offset(self) -> float:
        """What makes a number of the large operand a code (8 bits: signed) or a symmetric code."""
        return (128.0 if self.bits == 8 else 0.0) - (2.0 ** (self.bits - 1) if self.symmetric else 0.0)

    @property
    def has_summand(self) -> bool:
        return self.offset != 0 or not self.symmetric

    def affine(self, loader: Any, row: int, group: int) -> tuple[jax.Array, jax.Array | None]:
        factor = loader.scale[group][row].astype(jnp.float32)
        if loader.zero is None:
            return factor, factor * self.offset if self.offset else None
        zero = loader.zero[group][row].astype(jnp.float32)
        return factor, zero + factor * self.offset if self.offset else zero

    def read(self, operand: Any, row: int, head: int) -> list[list[jax.Array]]:
        return [[x.astype(self.unit)] for x in self.codes(operand.loader, row, head)]

    def codes(self, loader: Any, row: int, head: int, rows: slice = slice(None)) -> list[jax.Array]:
        """int8 planes, or some of their rows."""
        data = loader.codes.data
        words = pltpu.bitcast(data[row, own(data, head), rows], jnp.int32)
        if self.bits == 8:
            return [pltpu.bitcast(words ^ jnp.int32(-0x7F7F7F80), jnp.int8)]
        mask = jnp.int32((2**self.bits - 1) * 0x01010101)
        return [pltpu.bitcast((words >> (self.bits * i)) & mask, jnp.int8) for i in range(self.planes)]

    def decode(self, loader: Any, row: int, head: int) -> Callable[[int], list[jax.Array]]:
        index = own(loader.scale[0], head)
        affine = [self.affine(loader, row, c) for c in range(self.groups)]

        def laid_out(numbers: jax.Array, t: int) -> jax.Array:
            def chunk(c: int) -> jax.Array:
                start = (t * self.fold + c) * LANES
                return numbers[index : index + 1, start : start + LANES]

            return columns(chunk, self.fold, self.width)

        def tile(t: int) -> list[jax.Array]:
            codes = [x.astype(jnp.float32) for x in self.codes(loader, row, head, slice(t * LANES, (t + 1) * LANES))]
            found: list[Any] = [0.0] * self.planes
            for c, (factor, summand) in enumerate(affine):
                scale, shift = laid_out(factor, t), 0.0 if summand is None else laid_out(summand, t)
                for i in self.planes_of(c):
                    x = codes[i] * scale + shift
                    if self.groups > 1:
                        x = jnp.where(self.group_of_lane(i, LANES) == c, x, 0.0)
                    found[i] = found[i] + x
            return found

        return tile


def own(ref: Any, head: int) -> int:
    """The index of a kv head of the step in a reference that all heads may share."""
    return head if ref.shape[1] > 1 else 0
