"""The pages whose keys may matter most to a query."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from kvjax.cache.layout import CacheDims
from kvjax.cache.policy.seen import Tokens
from kvjax.cache.prompt import group_filled
from kvjax.cache.selector.base import Chosen, Selector
from kvjax.errors import UsageError
from kvjax.typing import Array
from pallas_kernels.pages import Pages

FAR = 1e30
"""Bounds of a page without tokens."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bounds:
    """Least and largest value of each channel of the keys of each page, [B, K, M, H]."""

    low: Array
    high: Array


@dataclasses.dataclass(frozen=True)
class TopPages(Selector):
    """Quest (Tang et al., 2024, arXiv:2406.10774): pages by an upper bound of their largest logit.

    A page's score is the sum over channels of max(q·low, q·high). Per kv head the `tokens / size` best pages are read,
    by the largest score in its group of query heads (the original has one query head per kv head), and always the
    last one, which may be filled in part. Decoded tokens select; a question of several tokens reads everything.

    Attributes:
      tokens: how many slots are read, in whole pages, the last page among them.
      size: slots per page (16 in the paper).
    """

    tokens: int = 1024
    size: int = 16

    def __post_init__(self) -> None:
        if self.size < 1 or self.tokens < self.size:
            raise UsageError(f"TopPages reads at least one page; got tokens={self.tokens} and size={self.size}")

    @property
    def page(self) -> int:
        return self.size

    def index(self, dims: CacheDims, pages: int) -> Bounds:
        shape = (dims.batch, dims.kv_heads, pages, dims.key_width)
        return Bounds(jnp.full(shape, FAR, dims.dtype), jnp.full(shape, -FAR, dims.dtype))

    def indexed(self, index: Bounds, keys: Array, valid: Array, page: Array) -> Bounds:
        there = valid[..., None]
        low = jnp.where(there, keys, FAR).min(3).astype(index.low.dtype)
        high = jnp.where(there, keys, -FAR).max(3).astype(index.low.dtype)
        b, k = jnp.arange(low.shape[0])[:, None, None], jnp.arange(low.shape[1])[None, :, None]
        at = b, k, jnp.broadcast_to(page, low.shape[:3])
        return Bounds(index.low.at[at].min(low, mode="drop"), index.high.at[at].max(high, mode="drop"))

    def choose(self, index: Bounds, tokens: Tokens, valid: Array) -> tuple[Chosen | None, Bounds]:
        number = self.tokens // self.size
        there = valid.any(-1)
        if number >= there.shape[-1] or tokens.valid.shape[1] > 1:
            return None, index
        queries = tokens.queries[:, :, :, 0].astype(jnp.float32)
        high, low = (x.astype(jnp.float32) for x in (index.high, index.low))
        up, down = jnp.maximum(queries, 0.0), jnp.minimum(queries, 0.0)
        bound = jnp.einsum("bkrh,bkmh->bkrm", up, high) + jnp.einsum("bkrh,bkmh->bkrm", down, low)
        bound = jnp.where(group_filled(tokens.step)[..., None], bound, -jnp.inf)
        score = jnp.where(there, bound.max(2), -jnp.inf)
        number_of_page = jnp.arange(there.shape[-1], dtype=jnp.int32)
        last = jnp.max(jnp.where(there, number_of_page, -1), axis=-1, keepdims=True)
        score = jnp.where(number_of_page == last, jnp.inf, score)
        table = jax.lax.top_k(score, number)[1].astype(jnp.int32)
        return Chosen(Pages(jnp.sort(table, axis=-1), self.size)), index
