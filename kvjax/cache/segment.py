"""Segments: slots of one precision, and the four things that happen to them: fill, write, read, copy."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from kvjax.cache.codec import Codec
from kvjax.typing import Array, PyTree
from pallas_kernels import cache_update
from pallas_kernels.rows import Rows, each

EMPTY = -1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Segment:
    """Encoded keys and values of S = M·block slots, and whose they are.

    Attributes:
      keys, values: stores of the codecs, leaves [B, K, S or S/codec.block, ...].
      positions: int32 [B, K or 1, S], the original position of each slot's token; -1 marks an empty slot. The head
        axis is 1 where all heads hold the same tokens.
      stats: f32 [B, K, S], the policy's statistic of each slot, or None.
      key_codec, value_codec: how to read and write the stores.
    """

    keys: PyTree
    values: PyTree
    positions: Array
    stats: Array | None
    key_codec: Codec = dataclasses.field(metadata={"static": True})
    value_codec: Codec = dataclasses.field(metadata={"static": True})

    @classmethod
    def empty(
        cls,
        batch: int,
        heads: int,
        slots: int,
        head_dim: int,
        dtype: str,
        key_codec: Codec,
        value_codec: Codec,
        per_head: bool,
        stats: bool,
    ) -> Segment:
        """No tokens; `slots` is a multiple of both codecs' blocks."""
        lead, kind = (batch, heads), jnp.dtype(dtype)
        return cls(
            keys=key_codec.empty(lead, slots // key_codec.block, head_dim, kind),
            values=value_codec.empty(lead, slots // value_codec.block, head_dim, kind),
            positions=jnp.full((batch, heads if per_head else 1, slots), EMPTY, jnp.int32),
            stats=jnp.zeros((batch, heads, slots), jnp.float32) if stats else None,
            key_codec=key_codec,
            value_codec=value_codec,
        )

    @property
    def slots(self) -> int:
        """S."""
        return self.positions.shape[-1]

    @property
    def valid(self) -> Array:
        """bool [B, K or 1, S]."""
        return self.positions >= 0

    def fill(self, keys: Array, values: Array, positions: Array, stats: Array | None) -> Segment:
        """The first n slots replaced by n tokens; for a segment that is empty.

        keys, values [B, K, n, H]; positions int32 [B, K or 1, n] with -1 for tokens that do not exist; stats [B, K, n].
        """
        n = positions.shape[-1]
        if n == 0:
            return self
        exists = (positions >= 0)[..., None]
        fresh = {
            "keys": self.key_codec.encode(jnp.where(exists, keys, 0)),
            "values": self.value_codec.encode(jnp.where(exists, values, 0)),
            "positions": jnp.broadcast_to(positions, (*self.positions.shape[:-1], n)),
            "stats": stats if self.stats is not None else None,
        }
        old = {"keys": self.keys, "values": self.values, "positions": self.positions, "stats": self.stats}

        def put(slot: Any, new: Any) -> Any:
            if isinstance(slot, Rows):
                return slot.prefix(new.natural())
            if new.shape == slot.shape:
                return new.astype(slot.dtype)
            return jax.lax.dynamic_update_slice(slot, new.astype(slot.dtype), (0,) * slot.ndim)

        return dataclasses.replace(self, **each(put, old, fresh))

    def write(
        self, keys: Array, values: Array, positions: Array, stats: Array | None, block: Array, size: int
    ) -> Segment:
        """One block of `size` tokens written in place.

        keys, values [B, K, size, H]; positions int32 [B, 1, size]; stats f32 [B, K, size] or None; block int32
        [B, K or 1], which block of `size` slots to overwrite; M (one too many) writes nothing.
        """
        return dataclasses.replace(
            self,
            keys=cache_update(self.keys, keys, block, encode=self.key_codec.encode),
            values=cache_update(self.values, values, block, encode=self.value_codec.encode),
            positions=cache_update(self.positions, positions, block),
            stats=None if self.stats is None else cache_update(self.stats, stats, block),
        )

    def clear(self, block: Array, size: int) -> Segment:
        """Blocks of `size` slots marked as empty; block as in `write`."""
        gone = jnp.full((*self.positions.shape[:2], size), EMPTY, jnp.int32)
        return dataclasses.replace(self, positions=cache_update(self.positions, gone, block))

    def read(self, start: Array, size: int) -> tuple[Array, Array, Array, Array | None]:
        """`size` consecutive slots from `start` int32 [B]: keys, values [B, K, size, H], positions, stats.

        For exact segments (block 1): the ring.
        """
        index = start[:, None] + jnp.arange(size, dtype=jnp.int32)

        def take(leaf: Array) -> Array:
            shape = (index.shape[0], 1, size) + (1,) * (leaf.ndim - 3)
            return jnp.take_along_axis(leaf, index.reshape(shape), axis=2)

        keys = self.key_codec.decode(jax.tree.map(take, self.keys))
        values = self.value_codec.decode(jax.tree.map(take, self.values))
        return keys, values, take(self.positions), None if self.stats is None else take(self.stats)
