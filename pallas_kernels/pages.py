"""`Pages`: slots that are read through a page table."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.loader import Loader


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pages:
    """Which pages of a pool make up the slots of a row and kv head, in order.

    Slot s of (row b, head k) is slot s % size of page `table[b, k, s // size]` of the pool. The pool is a loader whose
    slots lead with [B or 1, K or 1, n]; its size in slots is a multiple of `size`. A packed pool with an offset per
    (row, head) has consecutive numbers in its table; a selector has those that it chose.

    Attributes:
      table: int32 [B, K or 1, n], page numbers. Of pages that hold no valid slot it may hold anything.
      size: slots per page, a multiple of the blocks and row tiles of the pool.
    """

    table: jax.Array
    size: int = dataclasses.field(metadata={"static": True})

    @property
    def count(self) -> int:
        """S: slots of a row and head."""
        return self.table.shape[2] * self.size

    def take(self, x: jax.Array) -> jax.Array:
        """What x [B, K or 1, slots of the pool] says of the slots: [B, K or 1, S]."""
        heads = max(x.shape[1], self.table.shape[1])
        paged = x.reshape(*x.shape[:2], -1, self.size)
        table = jnp.broadcast_to(self.table, (len(self.table), heads, self.table.shape[2]))
        taken = jnp.take_along_axis(paged, table[..., None], axis=2)
        return taken.reshape(*taken.shape[:2], -1)

    def gather(self, pool: Loader) -> Loader:
        """A copy of the slots, in their order: a loader whose slots lead with [B, K or 1, ...]."""
        total = pool.count // self.size

        def leaf(x: jax.Array) -> jax.Array:
            rows, heads = x.shape[:2]
            x = x.reshape(rows, heads, total, x.shape[2] // total, *x.shape[3:])
            wide = max(heads, self.table.shape[1])
            table = jnp.broadcast_to(self.table, (self.table.shape[0], wide, self.table.shape[2]))
            b = jnp.arange(table.shape[0])[:, None, None] if rows > 1 else 0
            k = jnp.arange(wide)[:, None] if heads > 1 else 0
            x = x[b, k, jnp.clip(table, 0, total - 1)]
            return x.reshape(*x.shape[:2], -1, *x.shape[4:])

        return pool.with_slots(jax.tree.map(leaf, pool.slots))


def valid_slots(batch: int, slots: int, lengths: jax.Array | None, valid: jax.Array | None) -> jax.Array:
    """bool [B, K or 1, S]: the slots below `lengths` [B, K or 1] that `valid` [B, K or 1, S] lets through."""
    seen = jnp.ones((batch, 1, slots), bool) if valid is None else valid
    return seen if lengths is None else seen & (jnp.arange(slots) < lengths[..., None])
