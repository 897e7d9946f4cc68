"""A packed pool: tokens of a layer's heads in pages, each page the property of one head."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from kvjax.cache.codec import Codec
from kvjax.cache.layout import CacheDims
from kvjax.cache.policy.seen import Prompt
from kvjax.cache.segment import EMPTY, Segment
from kvjax.cache.selector import Chosen
from kvjax.cache.step import Step
from kvjax.typing import Array, PyTree
from pallas_kernels.logits import log_sum

PAGE, TILE = 32, 128
"""Slots of a small page, and what those of a large one are a multiple of: a tile of the TPU kernel."""
MANY = 8
"""Pages per head from which on they are large: one that is filled in part is then a small part of a head's budget."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pool:
    """M pages of P slots per row, which kv heads own in any number.

    A page is read as if it were a head: the queries of its owner, its own keys and values. What its owner's pages give
    is then merged, exactly. So every codec and every kernel works on pools, no page is read twice, and none is copied.

    Attributes:
      pages: the slots, with pages in place of heads: leaves [B, M, P, ...], positions [B, M, P].
      owner: int32 [B, M], the kv head that owns each page. Pages without tokens belong to any head.
    """

    pages: Segment
    owner: Array

    @classmethod
    def empty(
        cls, dims: CacheDims, tokens: int, key_codec: Codec, value_codec: Codec, data: tuple[PyTree, PyTree]
    ) -> Pool:
        """Room for `tokens` per head on average, in whole pages: a page per head may be filled in part."""
        size = page_slots(dims, tokens, key_codec, value_codec)
        pages = pool_pages(dims, tokens, size)
        shape = dataclasses.replace(dims, kv_heads=pages)
        made = Segment.empty(shape, size, key_codec, value_codec, per_head=True, stats=False, data=data)
        return cls(made, jnp.zeros((dims.batch, pages), jnp.int32))

    @property
    def stats(self) -> None:
        """Tokens of a pool do not compete again."""
        return None

    @property
    def codecs(self) -> tuple[Codec, Codec]:
        """See `Segment.codecs`."""
        return self.pages.codecs

    @property
    def stores(self) -> tuple[PyTree, PyTree]:
        """See `Segment.stores`."""
        return self.pages.stores

    @property
    def positions(self) -> Array:
        """int32 [B, M, P]."""
        return self.pages.positions

    @property
    def valid(self) -> Array:
        """bool [B, M, P]."""
        return self.pages.valid

    def per_head(self, heads: int) -> tuple[Array, float]:
        """Tokens that each row holds, f32 [B], and slots that there are, per kv head on average."""
        counts = self.valid.sum((1, 2), dtype=jnp.float32) / heads
        return counts, self.owner.shape[1] * self.pages.slots / heads

    def fill(self, prompt: Prompt, keys: Array, values: Array, chosen: Array) -> Pool:
        """The pool with the tokens `chosen` bool [B, K, T] of a prompt: keys as stored, values [B, K, T, H]."""
        size, number = self.pages.slots, self.owner.shape[1]
        tokens = chosen.shape[-1]
        ordered = jnp.sort(jnp.where(chosen, jnp.arange(tokens, dtype=jnp.int32), tokens), axis=-1)
        ends = jnp.cumsum(-(-chosen.sum(-1, dtype=jnp.int32) // size), axis=-1)
        page = jnp.arange(number, dtype=jnp.int32)
        owner = (page[:, None] >= ends[:, None]).sum(-1, dtype=jnp.int32)
        owner = jnp.minimum(owner, chosen.shape[1] - 1)
        first = jnp.take_along_axis(jnp.pad(ends, [(0, 0), (1, 0)]), owner, axis=1)
        rank = (page - first)[..., None] * size + jnp.arange(size, dtype=jnp.int32)
        rows = jnp.arange(len(owner))[:, None, None]
        place = ordered[rows, owner[..., None], jnp.minimum(rank, tokens - 1)]
        held = (rank < tokens) & (place < tokens)
        positions = jnp.where(held, place, EMPTY)
        at = rows, owner[..., None], jnp.where(held, place, 0)
        pages = self.pages.fill(keys[at], values[at], positions, None)
        return Pool(pages, owner)

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
        """See `Segment.attend`; never returns nor lowers logits, reads every page. places int32 [B, M, P] or None."""
        by_page = jnp.take_along_axis(queries, self.owner[..., None, None], axis=1)
        out, lse = self.pages.attend(by_page, step, places, query_positions, False)
        mine = self.owner[..., None] == jnp.arange(queries.shape[1])  # [B, M, K]
        top = jnp.max(jnp.where(mine[..., None], lse[:, :, None], -jnp.inf), axis=1)
        top = jnp.where(jnp.isneginf(top), 0.0, top)  # [B, K, R]
        weight = jnp.exp(lse - jnp.take_along_axis(top, self.owner[..., None], axis=1))
        shares = mine.astype(jnp.float32)
        total = jnp.einsum("bmk,bmr->bkr", shares, weight)
        summed = jnp.einsum("bmk,bmr,bmrh->bkrh", shares, weight, out, precision="highest")
        merged = summed / jnp.where(total == 0, 1.0, total)[..., None]
        return merged, log_sum(total, top)


def pool_pages(dims: CacheDims, tokens: int, size: int) -> int:
    """Pages of `size` slots for `tokens` per head on average: heads own whole ones, so each may leave one in part."""
    return dims.kv_heads * (-(-tokens // size) + 1)


def page_slots(dims: CacheDims, tokens: int, key_codec: Codec, value_codec: Codec) -> int:
    """Slots per page of a pool for `tokens` per head on average: a page that the platform's kernel reads, if any."""
    large = math.lcm(TILE, key_codec.even_slots(dims), value_codec.even_slots(dims.of_values))
    return large if tokens >= MANY * large else PAGE


Part = Segment | Pool
"""What attention reads of a layer's cache."""
