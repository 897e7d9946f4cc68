"""A step of a whole layer's cache: what reads the codecs, and what writes a new token in them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from kvjax.cache.layer_cache import LayerCache
from kvjax.cache.layout import CacheDims
from kvjax.cache.methods import parse

LLAMA = CacheDims(batch=4, kv_heads=8, query_heads=32, head_dim=128, max_length=8192, prompt_length=8000)


@dataclasses.dataclass(frozen=True)
class StepSpec:
    """One token for each row of a cache that holds `dims.prompt_length` tokens.

    Attributes:
      name: of the row.
      method: in the language of `methods.parse`.
      donated: the cache, which is written in place.
    """

    name: str
    method: str
    dims: CacheDims = LLAMA
    donated: tuple[int, ...] = (0,)

    @property
    def slots(self) -> int:
        """Tokens that a row has room for."""
        return self.dims.max_length

    @property
    def head_dim(self) -> int:
        return self.dims.head_dim

    def cache(self) -> LayerCache:
        """The cache, shapes only."""
        return jax.eval_shape(
            lambda: dataclasses.replace(LayerCache.init(parse(self.method), self.dims), phase="decode")
        )

    def abstract(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(cache, queries [B, 1, N, H], keys and values [B, 1, K, H]), shapes only."""
        dims = self.dims
        heads = (dims.query_heads, dims.kv_heads, dims.kv_heads)
        shapes = [(dims.batch, 1, count, dims.head_dim) for count in heads]
        return (self.cache(), *(jax.ShapeDtypeStruct(shape, jnp.dtype(dims.dtype)) for shape in shapes)), {}


PLAIN = tuple(StepSpec(name.replace("-", "_"), name) for name in ("full", "int8", "int4", "kivi-4"))
"""One of each layout: exact, per token without and with channel groups, per channel in blocks."""
POOLED = (
    StepSpec("pool", "adakv:share=0.5"),
    StepSpec("pool_int8", "adakv:share=0.5+int8"),
    StepSpec("pool_int4", "adakv:share=0.5+int4"),
)
"""Pages that belong to heads."""
HARDWARE = PLAIN + POOLED
