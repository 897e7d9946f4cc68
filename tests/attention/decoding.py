"""Small models of one kind of attention, run whole, and through caches a prompt and then token by token."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.attention import AttentionConfig, AttentionKind
from kvjax.cache.methods import parse
from kvjax.cache.model_cache import ModelCache
from kvjax.engine.prefill import cache_dims
from kvjax.models.config import TransformerConfig
from kvjax.models.language_model import LanguageModel
from kvjax.models.transformer import Transformer
from kvjax.typing import Array, PyTree
from tests.cache.driver import QUICK

LENGTHS = (20, 13, 1, 7)
PROMPT, STEPS = 20, 4
TOKENS = np.random.default_rng(0).integers(0, 48, (len(LENGTHS), PROMPT + STEPS), np.int32)


def config_of(kind: AttentionKind, **changes: Any) -> TransformerConfig:
    """D = 32, N = 8, K = 2, H = 8, two layers, unless `changes` say otherwise."""
    sizes = {"embed_dim": 32, "num_heads": 8, "num_kv_heads": 2, "head_dim": 8, "mlp_dim": 32}
    fixed = {"vocab_size": 48, "num_layers": 2, "max_positions": 64, "attention": kind}
    return TransformerConfig(**{**sizes, **fixed, **changes})


def drawn(shapes: PyTree, seed: int = 0) -> PyTree:
    """Parameters of these shapes, large enough for sharp attention; norms are 1."""
    rng = np.random.default_rng(seed)

    def leaf(path: Any, struct: jax.ShapeDtypeStruct) -> Array:
        x = rng.standard_normal(struct.shape).astype(np.float32)
        return jnp.asarray(np.ones_like(x) if "norm" in str(path) else x if "embedding" in str(path) else 0.3 * x)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


@functools.cache
def model_of(config: TransformerConfig) -> LanguageModel:
    """A model whose next token depends on all that its caches hold."""
    shapes = jax.eval_shape(Transformer(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    return LanguageModel(config, drawn(shapes))


def attention_of(
    kind: AttentionKind, config: AttentionConfig, width: int, seed: int = 0
) -> tuple[PyTree, Callable[..., Array]]:
    """Drawn parameters of a layer's attention, and (params, x f32 [B, T, width]) -> [B, T, width], without a cache."""
    module = kind.module(config, jnp.float32, "attention")

    def apply(params: PyTree, x: Array, rope: Any = None) -> Array:
        positions = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
        valid = jnp.ones(x.shape[:2], bool)
        return module.apply({"params": params}, x, positions=positions, valid=valid, rope=rope)[0]  # pyright: ignore[reportReturnType, reportIndexIssue]

    def init(key: Array, x: Array) -> PyTree:
        at = jnp.zeros(x.shape[:2], jnp.int32)
        return module.init(key, x, positions=at, valid=at == 0, rope=None)["params"]

    shapes = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 1, width)))
    return drawn(shapes, seed), apply


def whole(model: LanguageModel) -> np.ndarray:
    """Logits [B, T, V] of all tokens at once, without a cache."""
    return np.asarray(jax.jit(lambda m: m.apply(TOKENS)[0], compiler_options=QUICK)(model))


def through_cache(
    model: LanguageModel,
    method: str = "full",
    chunk: int = PROMPT,
    put: Callable[..., ModelCache] = lambda c: c,
) -> tuple[np.ndarray, list[np.ndarray], ModelCache]:
    """Logits [B, PROMPT, V] of the prompts (in chunks, where the method streams), [B, V] of each decoded token."""
    lengths = jnp.asarray(LENGTHS, jnp.int32)
    cache = ModelCache.init(parse(method), cache_dims(model, len(LENGTHS), PROMPT, PROMPT + STEPS, "float32"), lengths)
    layers, parts = put(cache).layers, []
    step = jax.jit(lambda m, layers, x, valid: m.apply(x, cache=layers, valid=valid), compiler_options=QUICK)
    for start in range(0, PROMPT, chunk):
        valid = start + np.arange(chunk) < np.array(LENGTHS)[:, None]
        logits, layers = step(model, layers, TOKENS[:, start : start + chunk], valid)
        parts.append(np.asarray(logits))
    layers, later = tuple(layer.end_prompt() for layer in layers), []
    for i in range(STEPS):
        token = TOKENS[np.arange(len(LENGTHS)), np.array(LENGTHS) + i][:, None]
        logits, layers = step(model, layers, token, np.ones(token.shape, bool))
        later.append(np.asarray(logits[:, 0]))
    return np.concatenate(parts, axis=1), later, cache


def assert_agree(model: LanguageModel, expected: np.ndarray, prompt: np.ndarray, later: list[np.ndarray]) -> None:
    """What `through_cache` gives is what `whole` gives, to 1e-5 of the largest logit."""
    scale = np.abs(expected).max()
    for b, length in enumerate(LENGTHS):
        np.testing.assert_allclose(prompt[b, :length] / scale, expected[b, :length] / scale, atol=1e-5, rtol=0)
        got = np.stack([logits[b] for logits in later])
        np.testing.assert_allclose(got / scale, expected[b, length : length + STEPS] / scale, atol=1e-5, rtol=0)
