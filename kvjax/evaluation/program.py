"""The compiled programs of a comparison, few and shared: compiling is what a comparison of small models waits for.

Whole-model programs: `kvjax.engine.recorded.record_prompt` (once for all methods), `feed` (once per method) and
`record_steps` (for the reference). What else a method needs is compiled for one layer and serves every layer of the
same shape.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kvjax.cache.head_split import AnyLayer
from kvjax.cache.layout import CacheDims
from kvjax.cache.model_cache import ModelCache
from kvjax.cache.recorder import RecordedStep, StepRecorder
from kvjax.models.transformer import Transformer
from kvjax.typing import Array, PyTree


def _anonymous(dims: CacheDims) -> CacheDims:
    """The dimensions without the layer's number, which only `head_index` depends on: equal layers share a program."""
    return dataclasses.replace(dims, layer=0)


@partial(jax.jit, static_argnames=("module",), donate_argnames=("cache",))
def feed(
    module: Transformer,
    params: PyTree,
    cache: ModelCache,
    logits: Array,
    tokens: Array,
    lengths: Array,
    steps: ArrayLike,
    free: Array,
) -> tuple[ModelCache, Array]:
    """Appends tokens one by one, as decoding does, and keeps what the model predicted before each of them.

    Args:
      logits: f32 [B, V], before the first token.
      tokens: int32 [B, F], of which the first `lengths` [B] of each row exist.
      steps: int32, how many tokens to feed; at most F.
      free: bool [B, F], where the model's own likeliest token is fed in place of the given one.

    Returns:
      The cache, and f32 [B, F + 1, V]: entry i predicts token i (zeros beyond `steps`).
    """
    batch, size = tokens.shape
    predicted = jnp.zeros((batch, size + 1, logits.shape[-1]), jnp.float32).at[:, 0].set(logits)

    def one(i: Array, carry: tuple[ModelCache, Array]) -> tuple[ModelCache, Array]:
        cache, predicted = carry
        valid = (i < lengths)[:, None]
        at = jnp.zeros((batch,), jnp.int32)
        token = jnp.where(free[:, i], jnp.argmax(predicted[:, i], axis=-1), tokens[:, i]).astype(jnp.int32)[:, None]
        fresh, layers = module.apply(
            {"params": params}, token, cache=cache.layers, valid=valid, logits_at=at, draws=cache.draws
        )
        return cache.stepped(layers), jax.lax.dynamic_update_slice_in_dim(predicted, fresh, i + 1, 1)

    return jax.lax.fori_loop(0, steps, one, (cache, predicted))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerRecording:
    """One layer's steps and what a reference gave back, leaves [F, B, ...]; the output projection, a weight, once."""

    seen: RecordedStep
    output_projection: Array | None


@partial(jax.jit, static_argnames=("module",))
def record_steps(
    module: Transformer, params: PyTree, cache: ModelCache, tokens: Array, lengths: Array, steps: ArrayLike
) -> tuple[LayerRecording, ...]:
    """What every layer was handed and gave back while `feed` would run; zeros beyond `steps`."""

    def recorders(layers: tuple[Any, ...], i: Array) -> tuple[StepRecorder, ...]:
        valid = (i < lengths)[:, None]
        token = jax.lax.dynamic_slice_in_dim(tokens, i, 1, axis=1)
        fresh = tuple(StepRecorder(layer) for layer in layers)
        return module.apply({"params": params}, token, cache=fresh, valid=valid, draws=cache.draws)[1]  # pyright: ignore[reportReturnType]

    def one(layers: tuple[Any, ...], i: Array) -> tuple[tuple[Any, ...], tuple[RecordedStep, ...]]:
        after = recorders(layers, i)
        return tuple(r.inner for r in after), tuple(_without_projection(r.seen) for r in after)

    def body(i: Array, carry: tuple[tuple[Any, ...], PyTree]) -> tuple[tuple[Any, ...], PyTree]:
        layers, kept = carry
        layers, seen = one(layers, i)
        return layers, jax.tree.map(lambda all_steps, new: all_steps.at[i].set(new), kept, seen)

    shapes = jax.eval_shape(one, cache.layers, jnp.int32(0))[1]
    kept = jax.tree.map(lambda s: jnp.zeros((tokens.shape[1], *s.shape), s.dtype), shapes)
    kept = jax.lax.fori_loop(0, steps, body, (cache.layers, kept))[1]
    projections = [r.seen and r.seen.step.output_projection for r in recorders(cache.layers, jnp.int32(0))]
    return tuple(map(LayerRecording, kept, projections))


def _without_projection(seen: RecordedStep | None) -> RecordedStep:
    assert seen is not None
    return dataclasses.replace(seen, step=dataclasses.replace(seen.step, output_projection=None))


def attention_errors(cache: ModelCache, recorded: tuple[LayerRecording, ...], steps: ArrayLike) -> Array:
    """Relative error of each layer's attention output when `cache` is handed the recorded steps, f32 [L].

    The root of the summed squared difference over the summed squared recorded output, over all valid tokens and heads.
    Every layer sees the reference's inputs, so errors of earlier layers do not add up.
    """
    layers = [dataclasses.replace(layer, dims=_anonymous(layer.dims)) for layer in cache]
    return jnp.stack([_layer_error(*pair, steps) for pair in zip(layers, recorded, strict=True)])


@jax.jit
def _layer_error(cache: AnyLayer, recorded: LayerRecording, steps: ArrayLike) -> Array:
    def one(i: Array, carry: tuple[AnyLayer, Array, Array]) -> tuple[AnyLayer, Array, Array]:
        cache, error, norm = carry
        now = jax.tree.map(lambda leaf: leaf[i], recorded.seen)
        output, cache = cache.step(dataclasses.replace(now.step, output_projection=recorded.output_projection))
        valid = now.step.valid[..., None, None]
        expected = now.output.astype(jnp.float32)
        error += jnp.sum(jnp.where(valid, output.astype(jnp.float32) - expected, 0.0) ** 2)
        return cache, error, norm + jnp.sum(jnp.where(valid, expected, 0.0) ** 2)

    zero = jnp.float32(0.0)
    _, error, norm = jax.lax.fori_loop(0, steps, one, (cache, zero, zero))
    return jnp.sqrt(error / jnp.maximum(norm, jnp.finfo(jnp.float32).tiny))


@jax.jit
def said(predicted: Array) -> Array:
    """The likeliest token at each place, int32 [B, F], of predictions f32 [B, F + 1, V] as `feed` gives them."""
    return jnp.argmax(predicted[:, :-1], axis=-1).astype(jnp.int32)


@jax.jit
def grade(predicted: Array, reference: Array, tokens: Array, graded: Array) -> tuple[Array, Array]:
    """Teacher-forced predictions against the tokens and against a reference's predictions.

    Args:
      predicted, reference: logits f32 [B, F + 1, V] as `feed` gives them.
      tokens: int32 [B, F]. graded: bool [B, F], which tokens count.

    Returns:
      The right token's surprisal, f32 [B, F] in nats, and the Kullback-Leibler divergence from the reference's
      distribution to this one, f32 [B, F] in nats; 0 where a token does not count.
    """
    ours = jax.nn.log_softmax(predicted[:, :-1])
    theirs = jax.nn.log_softmax(reference[:, :-1])
    surprisal = -jnp.take_along_axis(ours, tokens[..., None], axis=-1)[..., 0]
    divergence = jnp.sum(jnp.exp(theirs) * (theirs - ours), axis=-1)
    return jnp.where(graded, surprisal, 0.0), jnp.where(graded, divergence, 0.0)
