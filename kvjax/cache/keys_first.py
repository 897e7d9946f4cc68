"""Keys that are coded before their tokens leave the recent window; values slide out of it one by one.

Formats of keys want whole groups of tokens, formats of values do not. So KIVI's release (and QJL's) keeps a tail of
exact keys that is coded all at once when it has R tokens, while the newest R values are always exact. The recent
window is a ring of R slots. When it has been filled anew, all its keys enter the body's store, at the slots that their
tokens will have, and those in the ring are replaced by what their codes say; a token that leaves brings its value.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from kvjax.cache.segment import Segment, at_positions
from kvjax.typing import Array, PyTree
from pallas_kernels import cache_update

if TYPE_CHECKING:
    from kvjax.cache.layer_cache import LayerCache


def coded(cache: LayerCache) -> Array:
    """int32 [B]: after the sinks, how many tokens of each row have coded keys."""
    size = cache.layout.ring
    return jnp.maximum(cache.length - cache.layout.sinks, 0) // size * size


def rounded(cache: LayerCache, keys: Array) -> LayerCache:
    """A cache that a prompt has filled, whose ring then holds codes' values; keys [B, K, T, H] as they are stored."""
    ring, body, layout = cache.recent, cache.body, cache.layout
    if ring is None or body is None:
        return cache
    end = layout.sinks + coded(cache)
    last = end[:, None] - layout.ring + jnp.arange(layout.ring, dtype=jnp.int32)
    told = _decoded(body, body.encoded_keys(at_positions(keys, last[:, None])))
    early = (ring.positions >= 0) & (ring.positions < end[:, None, None])
    told = jnp.where(early[..., None], told, ring.decoded_keys)
    return dataclasses.replace(cache, recent=_with_keys(ring, told, jnp.zeros_like(end)))


def flush(cache: LayerCache, new: Array) -> LayerCache:
    """The cache after one more token where `new` bool [B]: rows whose ring has been filled anew get its keys coded."""
    ring, body, size = cache.recent, cache.body, cache.layout.ring
    if ring is None or body is None:
        return cache
    full = new & ((cache.length - cache.layout.sinks) % size == 0)
    exact = ring.decoded_keys

    def code(body: Segment = body) -> tuple[PyTree, Array]:
        codes = body.encoded_keys(exact)
        return codes, _decoded(body, codes)

    def nothing() -> tuple[PyTree, Array]:
        # Made of the keys, so that inside `shard_map` both branches vary over the mesh alike.
        false = jnp.isnan(exact.ravel()[0]) & False
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype) + false.astype(x.dtype), jax.eval_shape(code))

    codes, told = jax.lax.cond(full.any(), code, nothing)
    target = jnp.where(full, coded(cache) // size - 1, body.slots // size)[:, None]
    body = dataclasses.replace(body, keys=cache_update(body.keys, codes, target))
    return dataclasses.replace(cache, body=body, recent=_with_keys(ring, told, jnp.where(full, 0, 1)))


def _decoded(body: Segment, codes: PyTree) -> Array:
    return body.key_codec.decode(codes, body.key_params)


def _with_keys(ring: Segment, keys: Array, block: Array) -> Segment:
    """The ring with other keys f32 [B, K, R, H] where `block` int32 [B] is 0; 1 leaves a row as it is."""
    keys = keys.astype(jnp.float32)
    return dataclasses.replace(ring, keys=cache_update(ring.keys, keys, block[:, None], encode=ring.encoded_keys))
