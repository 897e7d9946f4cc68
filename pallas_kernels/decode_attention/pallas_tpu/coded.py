"""Formats of codes with a factor and a summand per slot, which multiply logits and weights instead of the codes."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.decode_attention.pallas_tpu import codes
from pallas_kernels.decode_attention.pallas_tpu.lanes import columns
from pallas_kernels.decode_attention.pallas_tpu.reader import Reader, Tile, own, paired
from pallas_kernels.rows import LANES


@dataclasses.dataclass(frozen=True)
class Coded(Reader):
    """x = number(code) · factor + summand; without factors (`groups` 0) a number is what it stands for.

    Attributes:
      bits: bits per code.
    """

    bits: int = 8

    @property
    def tile(self) -> int:
        # Rows of high bits hold twice as many slots.
        return LANES * self.fold * (2 if self.bits == 3 else 1)

    @property
    def terms(self) -> int:
        return 2

    def numbers(self, operand: Any, row: int, head: int, t: int) -> list[jax.Array]:
        """Planes f32 [128, lanes] of a tile before factors."""
        raise NotImplementedError

    def affine(self, loader: Any, row: int, group: int) -> tuple[jax.Array, jax.Array | None]:
        """Factor and summand f32 [kv heads of the step or 1, block] of each slot."""
        shape = (1, loader.codes.slots)
        factor = jnp.ones(shape, jnp.float32) if loader.scale is None else loader.scale[row].astype(jnp.float32)
        return factor, self._offset(loader, row)

    def _offset(self, loader: Any, row: int) -> jax.Array | None:
        return None

    def decode(self, operand: Any, row: int, head: int) -> Tile:
        affine = [self.affine(operand.loader, row, c) for c in range(self.groups)]

        def laid_out(numbers: jax.Array, t: int) -> jax.Array:
            index = own(numbers[None], head)

            def chunk(c: int) -> jax.Array:
                start = (t * self.fold + c) * LANES
                return numbers[index : index + 1, start : start + LANES]

            return columns(chunk, self.fold, self.width)

        def tile(t: int) -> list[jax.Array]:
            numbers = self.numbers(operand, row, head, t)
            if not affine:
                return numbers
            found: list[Any] = [0.0] * self.planes
            for c, (factor, summand) in enumerate(affine):
                scale, shift = laid_out(factor, t), 0.0 if summand is None else laid_out(summand, t)
                for i in self.planes_of(c):
                    x = numbers[i] * scale + shift
                    if self.groups > 1:
                        x = jnp.where(self.group_of_lane(i, LANES) == c, x, 0.0)
                    found[i] = found[i] + x
            return found

        return tile


@dataclasses.dataclass(frozen=True)
class Integer(Coded):
    """Integer codes, multiplied as they are.

    Attributes:
      symmetric: codes without zero points.
    """

    symmetric: bool = False

    @property
    def offset(self) -> float:
        """What makes a number of the large operand a code (8 bits: signed) or a symmetric code."""
        return (128.0 if self.bits == 8 else 0.0) - (2.0 ** (self.bits - 1) if self.symmetric else 0.0)

    @property
    def has_summand(self) -> bool:
        return self.offset != 0 or not self.symmetric

    @property
    def finite(self) -> bool:
        return True

    def affine(self, loader: Any, row: int, group: int) -> tuple[jax.Array, jax.Array | None]:
        factor = loader.scale[group][row].astype(jnp.float32)
        if loader.zero is None:
            return factor, factor * self.offset if self.offset else None
        zero = loader.zero[group][row].astype(jnp.float32)
        return factor, zero + factor * self.offset if self.offset else zero

    def read(self, operand: Any, row: int, head: int) -> list[list[jax.Array]]:
        return [[x.astype(self.unit)] for x in codes.planes(operand.loader, row, head, self.unit)]

    def numbers(self, operand: Any, row: int, head: int, t: int) -> list[jax.Array]:
        cut = slice(t * LANES, (t + 1) * LANES)
        return [x.astype(jnp.float32) for x in codes.planes(operand.loader, row, head, self.unit, cut)]


@dataclasses.dataclass(frozen=True)
class Fixed(Integer):
    """Integers around 0 without a factor; `symmetric`."""

    def affine(self, loader: Any, row: int, group: int) -> tuple[jax.Array, jax.Array | None]:
        one = jnp.ones((1, loader.codes.slots), jnp.float32)
        return one, one * self.offset if self.offset else None


@dataclasses.dataclass(frozen=True)
class Codebook(Coded):
    """Codes that name entries of a table.

    Attributes:
      offsets: whether a slot has a summand.
    """

    offsets: bool = False

    @property
    def has_summand(self) -> bool:
        return self.offsets

    @property
    def finite(self) -> bool:
        return True

    @property
    def decodes(self) -> bool:
        return True

    def constants(self, loader: Any) -> Any:
        """The table's entries in the first lanes of a row, f32 [K or 1, 1, 128]."""
        table = loader.table.astype(jnp.float32)
        return (jnp.pad(table, ((0, 0), (0, LANES - table.shape[1])))[:, None],)

    def _offset(self, loader: Any, row: int) -> jax.Array | None:
        return loader.offset[row].astype(jnp.float32) if self.offsets else None

    def read(self, operand: Any, row: int, head: int) -> list[list[jax.Array]]:
        tiles = operand.loader.codes.data.shape[2] // LANES
        return paired(lambda t: self.numbers(operand, row, head, t), tiles)

    def numbers(self, operand: Any, row: int, head: int, t: int) -> list[jax.Array]:
        (table,) = operand.constants
        index = head if table.shape[0] > 1 else 0
        cut = slice(t * LANES, (t + 1) * LANES)
        return [_look_up(x, table[index]) for x in codes.planes(operand.loader, row, head, jnp.bfloat16, cut)]


@dataclasses.dataclass(frozen=True)
class Float8(Coded):
    """Floating numbers of 8 bits, each exact in bfloat16, made of their bits by integer arithmetic.

    Attributes:
      mantissa: bits of the mantissa.
      special: the least magnitude, as an integer, that is infinite or not a number.
    """

    mantissa: int = 3
    special: int = 127

    @property
    def terms(self) -> int:
        return 2 if self.groups else 1

    @property
    def decodes(self) -> bool:
        return True

    def read(self, operand: Any, row: int, head: int) -> list[list[jax.Array]]:
        tiles = range(operand.loader.codes.data.shape[2] // LANES)
        parts = [self.numbers(operand, row, head, t)[0].astype(jnp.bfloat16) for t in tiles]
        return [[jnp.concatenate(parts, axis=0)]]

    def numbers(self, operand: Any, row: int, head: int, t: int) -> list[jax.Array]:
        cut = slice(t * LANES, (t + 1) * LANES)
        x = pltpu.bitcast(codes.words(operand.loader.codes, row, head, cut), jnp.int8).astype(jnp.int32)
        bias = 2 ** (6 - self.mantissa) - 1
        size, sign = x & 0x7F, x & jnp.int32(-(2**31))
        # By how much the exponent grows: the largest one, of what is not finite, becomes the largest of float32.
        more = jnp.where(size >= self.special, (0xFF - (0x7F >> self.mantissa)) << 23, (127 - bias) << 23)
        normal = (size << (23 - self.mantissa)) + more
        # A case of its own, because a subnormal number of float32 is 0 to a vector unit.
        small = size.astype(jnp.float32) * 2.0 ** (1 - bias - self.mantissa)
        found = jnp.where(size < 2**self.mantissa, pltpu.bitcast(small, jnp.int32), normal)
        return [pltpu.bitcast(found | sign, jnp.float32)]


def _look_up(plane: jax.Array, table: jax.Array) -> jax.Array:
    """The entry of each code [n, lanes] of a table [1, 128]: a vector register is permuted by another one."""
    entries = jnp.broadcast_to(table, (plane.shape[0], LANES))
    found = [
        jnp.take_along_axis(
            entries, plane[:, start : start + LANES].astype(jnp.int32), axis=1, mode="promise_in_bounds"
        )
        for start in range(0, plane.shape[1], LANES)
    ]
    return jnp.concatenate(found, axis=1)
