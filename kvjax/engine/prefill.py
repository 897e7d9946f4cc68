"""Prefill: prompts of different lengths into one cache, exactly or in chunks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from numpy.typing import NDArray

from kvjax.cache.layout import CacheDims, ceil_to
from kvjax.cache.method import CacheMethod
from kvjax.cache.model_cache import ModelCache
from kvjax.cache.plan import resolve
from kvjax.engine.calibrated import Calibrated, Data, own_buffers, unpack
from kvjax.engine.recorded import compress, record_prompt
from kvjax.engine.repetition import repeat
from kvjax.engine.request import as_count, as_stored_dtype
from kvjax.errors import UsageError
from kvjax.models.language_model import LanguageModel
from kvjax.models.transformer import Transformer
from kvjax.sharding import ShardingRules, shard_cache
from kvjax.typing import Array, PyTree

CHUNK = 256


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """A prefilled cache, and the logits that follow its last token (f32 [B, V])."""

    cache: ModelCache
    logits: Array

    def fork(self) -> Context:
        """A copy with buffers of its own: several continuations of one context."""
        return jax.tree.map(jnp.copy, self)


def bucket(length: int) -> int:
    """The padded length of a prompt, so that few shapes are compiled: powers of two, then multiples of 512."""
    if length > 512:
        return ceil_to(length, 512)
    return max(16, 1 << (length - 1).bit_length())


def cache_dims(
    model: LanguageModel, batch: int, prompt_length: int, max_length: int, dtype: str = "bfloat16"
) -> list[CacheDims]:
    """The dimensions of every layer's cache. Raises UsageError for a dtype that no token is stored in."""
    config, dtype = model.config, as_stored_dtype(dtype)
    return [
        CacheDims(
            batch=batch,
            query_heads=config.num_heads,
            max_length=max_length,
            prompt_length=prompt_length,
            dtype=dtype,
            window=config.window_of(layer),
            width=config.embed_dim,
            layer=layer,
            layers=config.num_layers,
            **dataclasses.asdict(config.cache_shape(layer)),
        )
        for layer in config.owners
    ]


def pad(rows: Sequence[Sequence[int] | NDArray[np.int32]], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows padded on the right with 0: int32 [B, length], and their lengths int32 [B]."""
    tokens = np.zeros((len(rows), length), np.int32)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = ids
    return tokens, np.array([len(ids) for ids in rows], np.int32)


def prefill(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    method: CacheMethod | Calibrated,
    *,
    reserve: int = 256,
    dtype: str = "bfloat16",
    length: int | None = None,
    chunk: int = CHUNK,
    draws: int | Sequence[int] = 0,
) -> Context:
    """Fills a cache with a batch of prompts (token ids).

    Args:
      reserve: tokens that each row can append later (questions and what is decoded).
      dtype: of tokens that are stored exactly.
      length: padded length of the prompts; default is a bucket.
      chunk: tokens per step of a streaming prefill.
      draws: which draw of the embeddings each row has, where the model draws them; a number n means n, n + 1, …

    Raises:
      UsageError: an empty prompt, a context beyond the model's limit, or a method that does not fit or was not
        calibrated to this model.
    """
    reserve = as_count("the number of tokens to reserve", reserve)
    longest = max((len(ids) for ids in prompts), default=0)
    if empty := ["the batch"] * (not prompts) + [f"prompt {row}" for row, ids in enumerate(prompts) if not len(ids)]:
        raise UsageError(f"{empty[0]} is empty, so there is nothing to attend to; give every row at least one token.")
    length = bucket(longest) if length is None else length
    if longest > length:
        raise UsageError(f"a prompt of {longest} tokens does not fit the padded length {length}")
    check_positions(model, longest + reserve)
    tokens, lengths = pad(prompts, length)
    dims = tuple(cache_dims(model, len(prompts), length, length + reserve, dtype))
    drawn = _draws(model, len(prompts), draws)
    method, data = unpack(method, model, dims)
    method = resolve(method, dims)
    if method.repetition is not None:
        return _prefill_repeated(model, method, dims, data, tokens, lengths, drawn)
    if method.prefill == "exact":
        rows = model.place_rows(tokens), model.place_rows(lengths), drawn
        logits, cache = _prefill_exact(model.module, method, dims, model.mesh, model.rules, data, model.params, *rows)
        return Context(cache, logits)
    cache = _empty_cache(method, dims, model.mesh, model.rules, data, model.place_rows(lengths), drawn)
    cache = cache if data is None else cache.fork()  # heads may share what was learnt, and steps take buffers over
    context = Context(cache, model.place_rows(np.zeros((len(prompts), model.config.vocab_size), np.float32)))
    for start in range(0, length, chunk):
        part = tokens[:, start : start + chunk]
        context = extend(model, context, part, np.clip(lengths - start, 0, part.shape[1]))
    return Context(context.cache.end_prompt(), context.logits)


def _draws(model: LanguageModel, batch: int, draws: int | Sequence[int]) -> Array | None:
    """uint32 [B], where the model draws its embeddings. Raises UsageError for another number of rows."""
    if model.config.embedding is None:
        return None
    named = [int(draws) + row for row in range(batch)] if isinstance(draws, int | np.integer) else list(draws)
    if len(named) != batch:
        raise UsageError(f"{len(named)} draws for {batch} rows; give one per row, or a number to count on from")
    return model.place_rows(np.array([draw % 2**32 for draw in named], np.uint32))


def extend(model: LanguageModel, context: Context, tokens: np.ndarray, lengths: np.ndarray) -> Context:
    """Appends a chunk: tokens int32 [B, T] of which the first `lengths` [B] of each row exist. Consumes the context."""
    rows = model.place_rows(tokens), model.place_rows(lengths)
    return _extend(model.module, model.params, context, *rows)


def check_positions(model: LanguageModel, tokens: int) -> None:
    """Raises UsageError where a row would go beyond the positions that the model was made for."""
    limit = model.config.max_positions
    if tokens > limit:
        raise UsageError(
            f"{tokens} tokens (prompt and what is to follow) are beyond the {limit} positions of model {model.name!r}. "
            f"Shorten the context, reserve less, or load a model with a longer context."
        )


def _empty_cache(
    method: CacheMethod,
    dims: tuple[CacheDims, ...],
    mesh: Mesh | None,
    rules: ShardingRules,
    data: Data | None,
    lengths: Array,
    draws: Array | None = None,
) -> ModelCache:
    cache = dataclasses.replace(ModelCache.init(method, dims, lengths, own_buffers(data)), draws=draws)
    return cache if mesh is None else shard_cache(cache, mesh, rules)


def _prefill_repeated(
    model: LanguageModel,
    method: CacheMethod,
    dims: tuple[CacheDims, ...],
    data: Data | None,
    tokens: NDArray[np.int32],
    lengths: NDArray[np.int32],
    draws: Array | None,
) -> Context:
    """Holds the prompt of every layer, uncompressed, until the model has repeated it."""
    assert method.repetition is not None
    if model.mesh is not None:
        raise UsageError(
            f"method {method.name!r} has the model repeat the prompt from every layer's whole prompt, which is kept on "
            "one device, but the model is spread over a mesh. Use the model without a mesh, or another method."
        )
    logits, prompt = record_prompt(model.module, model.params, tokens, lengths, draws)
    scores = repeat(model, prompt, tokens, lengths, method.repetition, draws)
    cache = compress(method, dims, prompt, jnp.asarray(lengths), data=data, scores=scores, draws=draws)
    return Context(cache, logits)


@jax.jit(static_argnames=("module", "method", "dims", "mesh", "rules"))
def _prefill_exact(
    module: Transformer,
    method: CacheMethod,
    dims: tuple[CacheDims, ...],
    mesh: Mesh | None,
    rules: ShardingRules,
    data: Data | None,
    params: PyTree,
    tokens: Array,
    lengths: Array,
    draws: Array | None,
) -> tuple[Array, ModelCache]:
    cache = _empty_cache(method, dims, mesh, rules, data, lengths, draws)
    valid = jnp.arange(tokens.shape[1]) < lengths[:, None]
    logits, layers = module.apply(
        {"params": params}, tokens, cache=cache.layers, valid=valid, logits_at=lengths - 1, draws=draws
    )
    return logits[:, 0], cache.stepped(layers)


@jax.jit(static_argnames=("module",), donate_argnames=("context",))
def _extend(module: Transformer, params: PyTree, context: Context, tokens: Array, lengths: Array) -> Context:
    """The logits stay as they are in rows that append nothing."""
    valid = jnp.arange(tokens.shape[1]) < lengths[:, None]
    last = jnp.maximum(lengths - 1, 0)
    cache = context.cache
    fresh, layers = module.apply(
        {"params": params}, tokens, cache=cache.layers, valid=valid, logits_at=last, draws=cache.draws
    )
    logits = jnp.where((lengths > 0)[:, None], fresh[:, 0], context.logits)
    return Context(cache.stepped(layers), logits)
