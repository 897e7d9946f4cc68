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

from pallas_kernels.decode_attention.pallas_tpu.lanes import lane, up
from pallas_kernels.decode_attention.pallas_tpu.unit import bfloat16_pair
from pallas_kernels.rows import LANES

Tile = Callable[[int], list[jax.Array]]
"""Tile t of a head's planes, each f32 [128, lanes]."""


@dataclasses.dataclass(frozen=True)
class Operand:
    """Keys or values of a step: their loader with references in place of arrays, constants and scratch memory."""

    loader: Any
    constants: Any = ()
    scratch: Any = ()


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

    @property
    def tile(self) -> int:
        """Slots in the smallest piece that can be decoded by itself."""
        return LANES * self.fold

    @property
    def channels(self) -> jax.Array:
        """int32 [planes · padded]: the channel of every lane of every plane."""
        plane = jnp.arange(self.planes)[:, None]
        return (plane * self.width + jnp.arange(self.padded) % self.width).reshape(-1)

    def planes_of(self, group: int) -> range:
        """Planes that hold channels of a group."""
        size = self.dim // max(1, self.groups)
        return range(group * size // self.width, -(-(group + 1) * size // self.width))

    def group_of_lane(self, plane: int, rows: int) -> jax.Array:
        """int32 [rows, lanes]: the group of each lane's channel."""
        channel = plane * self.width + lane((rows, self.lanes)) % self.width
        return channel // (self.dim // max(1, self.groups))

    def constants(self, loader: Any) -> Any:
        """Small arrays [K or 1, ...] that the kernel needs beside the slots; of heads it gets those of its step."""
        return ()

    def scratch(self, block: int, rows: int, heads: int) -> tuple[tuple[tuple[int, ...], Any], ...]:
        """Shape and dtype of what `prepare` writes, for a step of some rows of the batch and kv heads."""
        return ()

    def prepare(self, operand: Any) -> None:
        """What is done once for all heads of a block."""

    def turned(self, loader: Any) -> Any:
        """For each array of the loader's slots, whether the kernel gets it with slots along the lanes."""
        return jax.tree.map(lambda _: False, loader.slots)

    @property
    def has_summand(self) -> bool:
        return False

    @property
    def finite(self) -> bool:
        """Whether the planes are finite whatever bits a slot holds, so that a weight of 0 silences it."""
        return False

    @property
    def terms(self) -> int:
        """Numbers of bfloat16 that add up to a decoded one."""
        return 1 if self.unit == jnp.bfloat16 else 2

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

    def decode(self, operand: Any, row: int, head: int) -> Tile:
        """A function that gives tile t of the same planes as numbers f32 [128, lanes], scales included."""
        x = operand.loader.x
        return lambda t: [x[row, own(x, head), t * LANES : (t + 1) * LANES].astype(jnp.float32)]


def own(ref: Any, head: int) -> int:
    """The index of a kv head of the step in a reference that all heads may share."""
    return head if ref.shape[1] > 1 else 0


def paired(tile: Tile, tiles: int) -> list[list[jax.Array]]:
    """Planes as pairs of bfloat16 arrays, made tile by tile: what is decoded is never all alive."""
    pairs = [[bfloat16_pair(x) for x in tile(t)] for t in range(tiles)]
    return [[jnp.concatenate([pair[i][k] for pair in pairs], axis=0) for k in range(2)] for i in range(len(pairs[0]))]
