"""Segments: slots of one precision, and the four things that happen to them: fill, write, read, copy."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from kvjax.cache.codec import Codec
from kvjax.cache.layout import CacheDims
from kvjax.cache.policy.seen import Prompt
from kvjax.cache.selector import Chosen
from kvjax.cache.step import Step
from kvjax.typing import Array, PyTree
from pallas_kernels import ConcatLoader, RotatedLoader, cache_update, decode_attention, decode_logits, mix_slots
from pallas_kernels.loader import Loader
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
      weight: f32 [B, K or 1, S], how many tokens each slot stands for, or None where it is one.
      key_codec, value_codec: how to read and write the stores.
      key_params, value_params: the codecs' parameters, leaves [B or 1, K or 1, ...], or None.
      weighs: static; whether attention counts a slot as often as its weight says.
    """

    keys: PyTree
    values: PyTree
    positions: Array
    stats: Array | None
    key_codec: Codec = dataclasses.field(metadata={"static": True})
    value_codec: Codec = dataclasses.field(metadata={"static": True})
    key_params: PyTree = None
    value_params: PyTree = None
    weight: Array | None = None
    weighs: bool = dataclasses.field(default=True, metadata={"static": True})

    @classmethod
    def empty(
        cls,
        dims: CacheDims,
        slots: int,
        key_codec: Codec,
        value_codec: Codec,
        *,
        per_head: bool,
        stats: bool,
        data: tuple[PyTree, PyTree] = (None, None),
    ) -> Segment:
        """No tokens; `slots` is a multiple of both codecs' blocks. data: what the codecs were calibrated to."""
        return cls(
            keys=key_codec.empty(dims, slots // key_codec.block),
            values=value_codec.empty(dims.of_values, slots // value_codec.block),
            positions=jnp.full((dims.batch, dims.kv_heads if per_head else 1, slots), EMPTY, jnp.int32),
            stats=jnp.zeros((dims.batch, dims.kv_heads, slots), jnp.float32) if stats else None,
            key_codec=key_codec,
            value_codec=value_codec,
            key_params=key_codec.parameters(dims, data[0]),
            value_params=value_codec.parameters(dims.of_values, data[1]),
        )

    @property
    def key_loader(self) -> Loader:
        """How kernels read the keys."""
        return self.key_codec.loader(self.keys, self.key_params)

    @property
    def value_loader(self) -> Loader:
        """How kernels read the values."""
        return self.value_codec.loader(self.values, self.value_params)

    @property
    def slots(self) -> int:
        """S."""
        return self.positions.shape[-1]

    @property
    def decoded_keys(self) -> Array:
        """f32 [B, K, S, H], as stored: a full-size array unless nobody uses it."""
        return self.key_loader.decode()

    @property
    def decoded_values(self) -> Array:
        """f32 [B, K, S, H], as `decoded_keys`."""
        return self.value_loader.decode()

    def per_head(self, heads: int) -> tuple[Array, float]:
        """Tokens that each row holds, f32 [B], and slots that there are, per kv head on average."""
        return self.valid.sum(-1, dtype=jnp.float32).mean(1), self.slots

    @property
    def codecs(self) -> tuple[Codec, Codec]:
        """Of keys and values."""
        return self.key_codec, self.value_codec

    @property
    def stores(self) -> tuple[PyTree, PyTree]:
        """Encoded keys and values."""
        return self.keys, self.values

    @property
    def valid(self) -> Array:
        """bool [B, K or 1, S]."""
        return self.positions >= 0

    @property
    def bias(self) -> Array | None:
        """What is added to the logits of slots that stand for several tokens: f32 [B, K or 1, S], or None."""
        return None if self.weight is None or not self.weighs else jnp.log(jnp.maximum(self.weight, 1.0))

    def attend(
        self,
        queries: Array,
        step: Step,
        places: Array | None,
        query_positions: Array,
        logits: bool,
        chosen: Chosen | None = None,
        lowered: Array | None = None,
    ) -> tuple[Array, ...]:
        """As `pallas_kernels.decode_attention`, over the slots of this segment, or of some of its pages.

        Args:
          queries: [B, K, R, H], rotated. query_positions: int32 [B, R].
          places: int32 [B, K or 1, S], by which the keys are rotated, or None where they are stored rotated.
          logits: whether to return those too. chosen: what is read; None is everything.
          lowered: f32 [B, K or 1, S], by how much the logits of each slot are lowered, or None.
        """
        valid, positions = self.valid, self.positions
        if chosen is not None:
            valid, positions = chosen.valid(valid), chosen.pages.take(positions)
        return decode_attention(
            queries,
            self._compared(step, places),
            self.value_loader,
            valid=valid,
            pages=None if chosen is None else chosen.pages,
            positions=positions,
            return_logits=logits,
            **self._asked(step, query_positions, lowered),
        )

    def logits(self, queries: Array, step: Step, places: Array | None, query_positions: Array) -> Array:
        """Those of `attend`, f32 [B, K, R, S], from the keys alone; arguments as there."""
        asked = self._asked(step, query_positions, None)
        return decode_logits(queries, self._compared(step, places), valid=self.valid, positions=self.positions, **asked)

    def mix(self, slots: Array, weights: Array) -> Array:
        """The values of slots int32 [B, K, R, C], summed with weights f32 [B, K, R, C]: f32 [B, K, R, H].

        Only what lies in this segment, from 0 to S - 1, is read and counts; no slot of a query twice.
        """
        here = (slots >= 0) & (slots < self.slots)
        most, place = jax.lax.top_k(jnp.where(here, weights, -1.0), min(slots.shape[-1], self.slots))
        read = jnp.clip(jnp.take_along_axis(slots, place, axis=-1), 0, self.slots - 1)
        return mix_slots(self.value_loader, read, jnp.maximum(most, 0.0))

    def _compared(self, step: Step, places: Array | None) -> Loader:
        """The keys as queries meet them; places as in `attend`."""
        keys = self.key_loader
        if places is not None and step.rope is not None:
            keys = RotatedLoader(keys, places, step.rope)
        return keys if step.latent is None else ConcatLoader((self.value_loader, keys))

    def _asked(self, step: Step, query_positions: Array, lowered: Array | None) -> dict[str, Any]:
        """What makes logits of products; arguments as in `attend`."""
        bias = self.bias
        if lowered is not None:
            bias = -lowered if bias is None else bias - lowered
        static = {"window": step.window, "scale": step.scale, "softcap": step.softcap}
        return {"query_positions": query_positions, "bias": bias, **static}

    def fitted(self, keys: Array, values: Array, prompt: Prompt) -> Segment:
        """This segment with the codecs' parameters that a prompt gives: keys (as stored) and values [B, K, T, H]."""
        return dataclasses.replace(
            self,
            key_params=self.key_codec.fitted(self.key_params, keys, prompt),
            value_params=self.value_codec.fitted(self.value_params, values, prompt),
        )

    def fill(
        self, keys: Array, values: Array, positions: Array, stats: Array | None, ahead: Array | None = None
    ) -> Segment:
        """The first n slots replaced by n tokens; for a segment that is empty.

        keys, values [B, K, n, H]; positions int32 [B, K or 1, n] with -1 for tokens that do not exist; stats [B, K, n].
        ahead: as positions, where there is a key; None is where there is a token.
        """
        n = positions.shape[-1]
        if n == 0:
            return self
        exists = (positions >= 0)[..., None]
        has_key = exists if ahead is None else (ahead >= 0)[..., None]
        fresh = {
            "keys": self.key_codec.encode(jnp.where(has_key, keys, 0), self.key_params),
            "values": self.value_codec.encode(jnp.where(exists, values, 0), self.value_params),
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
        self, keys: Array | None, values: Array, positions: Array, stats: Array | None, block: Array, size: int
    ) -> Segment:
        """One block of `size` tokens written in place.

        keys (None: they are there already), values [B, K, size, H]; positions int32 [B, 1, size]; stats f32
        [B, K, size] or None; block int32 [B, K or 1], which block of `size` slots to overwrite; M (one too many)
        writes nothing.
        """
        return dataclasses.replace(
            self,
            keys=self.keys if keys is None else cache_update(self.keys, keys, block, encode=self.encoded_keys),
            values=cache_update(
                self.values, values, block, encode=lambda x: self.value_codec.encode(x, self.value_params)
            ),
            positions=cache_update(self.positions, positions, block),
            stats=None if self.stats is None else cache_update(self.stats, stats, block),
        )

    def encoded_keys(self, keys: Array) -> PyTree:
        """Keys [B, K, n, H] as they are stored."""
        return self.key_codec.encode(keys, self.key_params)

    def clear(self, block: Array, size: int) -> Segment:
        """Blocks of `size` slots marked as empty; block as in `write`."""
        gone = jnp.full((*self.positions.shape[:2], size), EMPTY, jnp.int32)
        return dataclasses.replace(self, positions=cache_update(self.positions, gone, block))

    def block_at(self, block: Array, size: int) -> tuple[Array, Array, Array]:
        """Block number `block` int32 [B, K or 1] of `size` slots: keys, values [B, K, size, H], positions."""
        heads = jax.tree.leaves(self.keys)[0].shape[1]
        keys, values = (
            each(lambda x: _entries_of(x, jnp.broadcast_to(block, (block.shape[0], heads)), size, self.slots), store)
            for store in (self.keys, self.values)
        )
        decoded = self.key_codec.decode(keys, self.key_params), self.value_codec.decode(values, self.value_params)
        return *decoded, _entries_of(self.positions, block, size, self.slots)

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


def _entries_of(leaf: Any, block: Array, size: int, slots: int) -> Any:
    """The entries of a leaf [B, K or 1, n, ...] (or `Rows`) that belong to one block of each head; block [B, K]."""
    if isinstance(leaf, Rows):
        at = block[..., None] * size + jnp.arange(size, dtype=jnp.int32)
        return Rows.of(leaf.take(at[:, : leaf.data.shape[1]]))
    count = leaf.shape[2] * size // slots
    at = (block[..., None] * count + jnp.arange(count, dtype=jnp.int32))[:, : leaf.shape[1]]
    return jnp.take_along_axis(leaf, at.reshape(*at.shape, *(1,) * (leaf.ndim - 3)), axis=2)


def at_positions(x: Array, positions: Array) -> Array:
    """x [B, K, T, ...] at positions int32 [B, K or 1, n]; anything where a position is EMPTY."""
    index = jnp.maximum(positions, 0)
    return jnp.take_along_axis(x, index.reshape(*index.shape, *(1,) * (x.ndim - 3)), axis=2)


def where_true(mask: Array, most: int, block: int) -> Array:
    """The first `most` places where `mask` bool [..., T] holds, in order, then EMPTY: int32, whole blocks."""
    tokens = mask.shape[-1]
    ordered = jnp.sort(jnp.where(mask, jnp.arange(tokens, dtype=jnp.int32), tokens), axis=-1)
    ordered = jnp.pad(ordered, [(0, 0)] * (mask.ndim - 1) + [(0, -tokens % block)], constant_values=tokens)
    ordered = ordered[..., : min(most, ordered.shape[-1])]
    return jnp.where(ordered < tokens, ordered, EMPTY)
