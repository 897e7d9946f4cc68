"""Formats that are decoded before they are multiplied: to two bfloat16 numbers, which float32 is nearly the sum of."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.decode_attention.pallas_tpu.coded import Integer
from pallas_kernels.decode_attention.pallas_tpu.lanes import columns, lane, placement
from pallas_kernels.decode_attention.pallas_tpu.reader import Operand, Reader, Tile, own, paired
from pallas_kernels.decode_attention.pallas_tpu.unit import dot
from pallas_kernels.rows import LANES


@dataclasses.dataclass(frozen=True)
class Blockwise(Integer):
    """Integer codes whose scales belong to a channel of a block of slots; decoded before they are multiplied.

    Attributes:
      size: slots per block.
    """

    size: int = 32

    @property
    def has_summand(self) -> bool:
        return False

    @property
    def finite(self) -> bool:
        return False

    @property
    def decodes(self) -> bool:
        return True

    def read(self, operand: Any, row: int, head: int) -> list[list[jax.Array]]:
        data = operand.loader.codes.data
        return paired(self.decode(operand, row, head), data.shape[2] // LANES)

    def decode(self, operand: Any, row: int, head: int) -> Tile:
        loader, scale = operand.loader, operand.loader.scale[0]
        factor = scale[row, own(scale, head)].astype(jnp.float32)
        summand = self.offset * factor
        if loader.zero is not None:
            summand = summand + loader.zero[0][row, own(loader.zero[0], head)].astype(jnp.float32)
        scales, shifts = ([self._laid_out(x, i) for i in range(self.planes)] for x in (factor, summand))
        each = LANES // self.size

        def long(x: jax.Array, t: int) -> jax.Array:
            """[128, lanes], a row of x for every slot of a block."""
            x = x[t * each : (t + 1) * each]
            return jnp.broadcast_to(x[:, None], (each, self.size, self.lanes)).reshape(LANES, self.lanes)

        def tile(t: int) -> list[jax.Array]:
            numbers = self.numbers(operand, row, head, t)
            return [x * long(scales[i], t) + long(shifts[i], t) for i, x in enumerate(numbers)]

        return tile

    def _laid_out(self, x: jax.Array, plane: int) -> jax.Array:
        """f32 [tiles · 128 / size, lanes] of a plane: the numbers [M, H] of blocks, where their slots lie."""
        each = LANES // self.size
        if self.fold * self.planes > 1:
            x = dot(x, placement(self.dim, plane, self.fold, self.width).astype(jnp.float32))
        if self.fold > 1:
            parts = [x[i : i + each] for i in range(0, x.shape[0], each)]
            part = lane((each, self.lanes)) // self.width
            tiles = []
            for t in range(0, len(parts), self.fold):
                tile = parts[t]
                for j in range(1, self.fold):
                    tile = jnp.where(part >= j, parts[t + j], tile)
                tiles.append(tile)
            x = jnp.concatenate(tiles, axis=0)
        return x


@dataclasses.dataclass(frozen=True)
class Rotated(Reader):
    """Keys that are decoded and rotated.

    Attributes:
      inner: reader of the unrotated keys.
      shared: positions are those of all kv heads.
    """

    inner: Reader = Reader(jnp.float32, 0)
    shared: bool = True

    @property
    def tables(self) -> int:
        """Planes with frequencies of their own: a channel and its partner half a head away have the same."""
        return max(1, self.planes // 2)

    @property
    def tile(self) -> int:
        return self.inner.tile

    def constants(self, loader: Any) -> Any:
        """Frequency and amplitude of every lane, f32 [1, 2, tables · padded], and what the unrotated keys need."""
        rope, channels = loader.rope, self.channels[: self.tables * self.padded]
        frequency = rope.inv_freq.astype(jnp.float32)[channels % (self.dim // 2)]
        amplitude = jnp.broadcast_to(rope.amplitude.astype(jnp.float32), frequency.shape)
        return jnp.stack([frequency, amplitude])[None], self.inner.constants(loader.inner)

    def scratch(self, block: int, rows: int, heads: int) -> tuple[tuple[tuple[int, ...], Any], ...]:
        shape = (rows * (1 if self.shared else heads), self.tables, block // self.fold, self.padded)
        return ((shape, jnp.float32), (shape, jnp.float32))

    def prepare(self, operand: Any) -> None:
        """Cosines and sines of all slots; the sines of the first half of a head are negative in a single plane."""
        positions, (table, _), (cos, sin) = operand.loader.positions, operand.constants, operand.scratch
        rows, heads, block = positions.shape
        for row, head in ((i, h) for i in range(rows) for h in range(heads)):
            now = positions[row, head : head + 1].astype(jnp.float32)
            for t in range(block // (LANES * self.fold)):

                def chunk(j: int, now: jax.Array = now, t: int = t) -> jax.Array:
                    start = (t * self.fold + j) * LANES
                    return now[:, start : start + LANES]

                at = columns(chunk, self.fold, self.width)
                for i in range(self.tables):
                    lanes = slice(i * self.padded, i * self.padded + self.lanes)
                    angle, amplitude = at * table[0, 0:1, lanes], table[0, 1:2, lanes]
                    place = (row * heads + head, i, slice(t * LANES, (t + 1) * LANES), slice(0, self.lanes))
                    cos[place] = jnp.cos(angle) * amplitude
                    found = jnp.sin(angle) * amplitude
                    if self.planes == 1:
                        found = jnp.where(lane(found.shape) % self.dim < self.dim // 2, -found, found)
                    sin[place] = found

    @property
    def decodes(self) -> bool:
        return True

    def read(self, operand: Any, row: int, head: int) -> list[list[jax.Array]]:
        loader = operand.loader
        inner = self.inner.decode(Operand(loader.inner, operand.constants[1]), row, head)
        number = row * loader.positions.shape[1] + (0 if self.shared else head)
        half = self.planes // 2

        def tile(t: int) -> list[jax.Array]:
            x = inner(t)
            place = (slice(t * LANES, (t + 1) * LANES), slice(0, self.lanes))
            cos, sin = ([ref[(number, i, *place)] for i in range(self.tables)] for ref in operand.scratch)
            if self.planes == 1:
                return [x[0] * cos[0] + self._partner(x[0]) * sin[0]]
            low = [x[i] * cos[i] - x[i + half] * sin[i] for i in range(half)]
            return low + [x[i + half] * cos[i] + x[i] * sin[i] for i in range(half)]

        return paired(tile, operand.scratch[0].shape[2] // LANES)

    def _partner(self, x: jax.Array) -> jax.Array:
        """The channel half a head away, in the lane of each channel."""
        half = self.dim // 2
        if self.lanes % LANES:
            return jnp.concatenate([x[:, half:], x[:, :half]], axis=1)
        ahead = pltpu.roll(x, self.lanes - half, 1)
        if self.fold == 1:
            return ahead
        return jnp.where(lane(x.shape) % self.dim < half, ahead, pltpu.roll(x, half, 1))
