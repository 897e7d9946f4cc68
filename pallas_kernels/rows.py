"""`Rows`: what each slot stores, as rows of a two-dimensional array that no platform pads.

An accelerator keeps the last two axes of an array in tiles of 8 x 128 or more elements. A slot that takes fewer than
128 bytes would occupy 128 all the same, so several slots share a row there: a tile of 128 · F slots is 128 rows of F
slots, and slot j · 128 + r of the tile is the j-th part of its row r. Slots of one part are then neighbours along the
rows, as their positions and scales are along the lanes, and no kernel has to interleave. With F = 1 a row is a slot.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

LANES = 128
"""Elements of the last axis of a TPU tile, and slots per part of a folded tile."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """`width` numbers per slot, F = fold slots per row.

    Attributes:
      data: [..., R, F·width] for S = R·F slots; with F > 1 R is a multiple of 128.
      width: numbers per slot.
    """

    data: jax.Array
    width: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, x: jax.Array, fold: int = 1) -> Rows:
        """The rows of x [..., S, width]; S is a multiple of `tile(fold)`."""
        *lead, slots, width = x.shape
        if fold > 1:
            x = x.reshape(*lead, slots // tile(fold), fold, LANES, width)
            x = jnp.swapaxes(x, -3, -2).reshape(*lead, slots // fold, fold * width)
        return cls(x, width)

    @property
    def fold(self) -> int:
        """Slots per row."""
        return self.data.shape[-1] // self.width

    @property
    def slots(self) -> int:
        """S."""
        return self.data.shape[-2] * self.fold

    def natural(self) -> jax.Array:
        """[..., S, width], slots in their order."""
        fold = self.fold
        if fold == 1:
            return self.data
        *lead, rows, _ = self.data.shape
        x = self.data.reshape(*lead, rows // LANES, LANES, fold, self.width)
        return jnp.swapaxes(x, -3, -2).reshape(*lead, rows * fold, self.width)

    def folded(self, fold: int) -> Rows:
        """The same slots with another number per row."""
        return self if fold == self.fold else Rows.of(self.natural(), fold)

    def put(self, slot: jax.Array, x: jax.Array) -> Rows:
        """These rows with `x` [B, K, n, width] in the slots `slot` int32 [B, K, n]; slots from S on are left out.

        For data [B, K, R, F·width]; no slot twice.
        """
        numbers = jax.lax.ScatterDimensionNumbers((3,), (0, 1, 2), (0, 1, 2, 3))
        drop = jax.lax.GatherScatterMode.FILL_OR_DROP
        data = jax.lax.scatter(self.data, self._place(slot), x, numbers, unique_indices=True, mode=drop)
        return Rows(data, self.width)

    def take(self, slot: jax.Array) -> jax.Array:
        """[B, K, n, width]: the slots `slot` int32 [B, K, n] of data [B, K, R, F·width]."""
        if self.fold == 1:
            return jnp.take_along_axis(self.data, slot[..., None], axis=2)
        b, k, row, column = jnp.moveaxis(self._place(slot), -1, 0)
        columns = column[..., None] + jnp.arange(self.width)
        return self.data[b[..., None], k[..., None], row[..., None], columns]

    def prefix(self, x: jax.Array) -> Rows:
        """These rows with `x` [..., n, width] in the first n slots; what follows in their tile becomes 0."""
        slots = -(-x.shape[-2] // tile(self.fold)) * tile(self.fold)
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, slots - x.shape[-2]), (0, 0)])
        fresh = Rows.of(x, self.fold).data
        return Rows(jax.lax.dynamic_update_slice(self.data, fresh, (0,) * fresh.ndim), self.width)

    def _place(self, slot: jax.Array) -> jax.Array:
        """int32 [B, K, n, 4]: row, head, row of data and first column of each slot."""
        batch, heads, _ = slot.shape
        tiles, within = jnp.divmod(slot, tile(self.fold))
        row = tiles * LANES + within % LANES if self.fold > 1 else slot
        column = within // LANES * self.width
        b, k = jnp.arange(batch)[:, None, None], jnp.arange(heads)[None, :, None]
        return jnp.stack(jnp.broadcast_arrays(b, k, row, column), axis=-1).astype(jnp.int32)


def tile(fold: int) -> int:
    """Slots in the smallest piece that can be cut out of rows without moving data."""
    return LANES * fold if fold > 1 else 1


def each(function: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """`jax.tree.map` in which `Rows` are leaves."""
    return jax.tree.map(function, tree, *rest, is_leaf=is_rows)


def is_rows(x: Any) -> bool:
    """Whether x is `Rows`."""
    return isinstance(x, Rows)


def fold(tree: Any, platform: str | None = None) -> Any:
    """The tree with its `Rows` folded as `platform` (default: this process's backend) wants them."""

    def leaf(x: Any) -> Any:
        return x.folded(fold_for(x.width, x.slots, platform)) if isinstance(x, Rows) else x

    return each(leaf, tree)


def unfold(tree: Any) -> Any:
    """The tree with one slot per row in its `Rows`, the form in which stores are compared and kept on disk."""
    return each(lambda x: x.folded(1) if isinstance(x, Rows) else x, tree)


def fold_for(width: int, slots: int, platform: str | None = None) -> int:
    """Slots per row that fill 128 lanes where the platform has lanes, and 1 where they would not come out even."""
    fold = LANES // width if even_slots(width, platform) > 1 else 1
    return fold if slots % tile(fold) == 0 else 1


def even_slots(width: int, platform: str | None = None) -> int:
    """The multiple of which a number of slots must be for `fold_for` to fill the lanes."""
    return tile(LANES // width) if (platform or here()) == "tpu" and LANES % width == 0 else 1


def here() -> str:
    """The platform for which stores are laid out: this process's backend."""
    return jax.default_backend()
