"""An exact pass over prompts that keeps every layer's, and the caches that methods make of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kvjax.cache.head_split import AnyLayer, empty_layer
from kvjax.cache.layer_cache import NO_DATA, LayerData
from kvjax.cache.layout import CacheDims
from kvjax.cache.method import CacheMethod
from kvjax.cache.model_cache import ModelCache
from kvjax.cache.recorder import PromptRecorder, RecordedPrompt
from kvjax.engine.calibrated import Data
from kvjax.models.transformer import Transformer
from kvjax.typing import Array, PyTree


@jax.jit(static_argnames=("module",))
def record_prompt(
    module: Transformer, params: PyTree, tokens: Array, lengths: Array, draws: Array | None = None
) -> tuple[Array, tuple[RecordedPrompt, ...]]:
    """The exact pass over prompts int32 [B, P]: the logits after each row's last token f32 [B, V], and every layer's
    prompt. draws: uint32 [B], where the model draws its embeddings."""
    empty = tuple(PromptRecorder(jnp.zeros_like(lengths)) for _ in module.config.owners)
    valid = jnp.arange(tokens.shape[1]) < lengths[:, None]
    logits, layers = module.apply(
        {"params": params}, tokens, cache=empty, valid=valid, logits_at=lengths - 1, draws=draws
    )
    return logits[:, 0], layers  # pyright: ignore[reportReturnType]


def compress(
    method: CacheMethod,
    dims: tuple[CacheDims, ...],
    prompt: tuple[RecordedPrompt, ...],
    lengths: Array,
    *,
    unread: int = 0,
    data: Data | None = None,
    scores: Sequence[Array | None] | None = None,
    draws: Array | None = None,
) -> ModelCache:
    """The cache that `method` makes of a recorded prompt, layer by layer; its budget must be in tokens.

    Its last `unread` tokens are shown to the method, but left for the cache to be fed with.

    Args:
      scores: f32 [B, K, P] of each layer, for a method with a `repetition`.
      draws: uint32 [B], where the model draws its embeddings.
    """
    none = (None,) * len(dims)
    layers = []
    for layer_dims, recorded, learnt, given in zip(dims, prompt, data or none, scores or none, strict=True):
        heads = layer_dims.layer * layer_dims.kv_heads + jnp.arange(layer_dims.kv_heads, dtype=jnp.int32)
        here = method.for_layer(layer_dims)
        anonymous = dataclasses.replace(layer_dims, layer=0)  # only `heads` depend on it: equal layers share a program
        layer = _compress_layer(here, anonymous, recorded, lengths, heads, learnt or NO_DATA, unread, given)
        layers.append(dataclasses.replace(layer, dims=layer_dims))
    # Steps donate the cache, so no buffer may be shared.
    return ModelCache(tuple(layers), jnp.copy(lengths) - unread, method, jax.tree.map(jnp.copy, draws))


@jax.jit(static_argnames=("method", "dims", "unread"))
def _compress_layer(
    method: CacheMethod,
    dims: CacheDims,
    recorded: RecordedPrompt,
    lengths: Array,
    head_index: Array,
    learnt: LayerData,
    unread: int,
    scores: Array | None,
) -> AnyLayer:
    cache = empty_layer(method, dims, lengths, jax.tree.map(jnp.copy, learnt)).numbered(head_index)
    return cache.absorb_prompt(recorded.step, recorded.log_sum_exp, unread, scores)
