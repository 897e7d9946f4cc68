"""The selective attention module: the slow transcription, caches, eviction, gradients, and what it costs."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.attention import AttentionConfig, GroupedQuery, SelectiveAttention
from kvjax.attention.rope import RopeConfig
from kvjax.cache.method import CacheMethod
from kvjax.cache.methods import parse
from kvjax.cache.model_cache import ModelCache
from kvjax.cache.plan import layer_bytes
from kvjax.engine.prefill import cache_dims, pad, prefill
from kvjax.errors import UsageError
from kvjax.models.config import TransformerConfig
from kvjax.models.language_model import LanguageModel
from kvjax.models.transformer import Transformer
from tests.oracles.rotary import rotate_each
from tests.oracles.selective import attend

B, T, D, N, K, H = 2, 10, 32, 4, 2, 8
CONFIG = TransformerConfig(
    vocab_size=40,
    embed_dim=D,
    num_layers=2,
    num_heads=N,
    num_kv_heads=K,
    head_dim=H,
    mlp_dim=32,
    max_positions=64,
    attention=SelectiveAttention(),
    windows=(None, 7),
)
THETA = 10000.0
PROMPTS = [np.random.default_rng(5).integers(0, 40, n).tolist() for n in (17, 9, 1)]
LATER = np.random.default_rng(6).integers(0, 40, (3, 4)).astype(np.int32)


def layer(window: int | None = None) -> tuple[Any, Any, jax.Array]:
    """A module, parameters large enough that much is hidden, and inputs f32 [B, T, D]."""
    sizes = AttentionConfig(N, K, H, scale=H**-0.5, window=window)
    module = SelectiveAttention().module(sizes, jnp.float32, "attention")
    x = jax.random.normal(jax.random.key(1), (B, T, D))
    params = module.init(jax.random.key(0), x, **around())
    return module, jax.tree.map(lambda leaf: 1.5 * leaf, params), x


def around() -> dict[str, Any]:
    positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    return {"positions": positions, "valid": jnp.ones((B, T), bool), "rope": RopeConfig(THETA).table(H, jnp.int32(T))}


def transcribed(params: Any, x: np.ndarray, window: int | None) -> np.ndarray:
    """The module [B, T, D] in float64."""
    kernels = {name: np.asarray(leaf["kernel"], np.float64) for name, leaf in params["params"].items()}
    out = []
    for one in x.astype(np.float64):
        q, k, v = (np.einsum("td,dnh->tnh", one, kernels[name]) for name in "qkv")
        q, k = (rotate_each(part, np.arange(T), THETA) for part in (q, k))
        read = attend(q, k, v, H**-0.5, reads=[n * K // N for n in range(N)], window=window)
        out.append(np.einsum("tnh,nhd->td", read, kernels["o"]))
    return np.stack(out)


@pytest.mark.parametrize("window", [None, 4])
def test_the_module_equals_the_transcription(window: int | None) -> None:
    module, params, x = layer(window)
    out, _ = module.apply(params, x, **around())
    np.testing.assert_allclose(out, transcribed(params, np.asarray(x), window), atol=2e-5)
    plain = GroupedQuery().module(module.config, jnp.float32, "attention")
    assert np.abs(plain.apply(params, x, **around())[0] - out).max() > 0.1, "nothing is hidden, so nothing is tested"


def test_gradients_are_those_of_the_transcription() -> None:
    """Finite differences, in float64, of a random projection of the output along random directions of the inputs."""
    module, params, x = layer()
    weigh = np.random.default_rng(2).standard_normal((B, T, D))

    def loss(params: Any, x: jax.Array) -> jax.Array:
        return jnp.sum(module.apply(params, x, **around())[0] * weigh)

    found = jax.jit(jax.grad(loss, (0, 1)))(params, x)
    rng = np.random.default_rng(4)
    for _ in range(4):
        way = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape), (params, x))
        wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (params, x))

        def at(step: float, way: Any = way, wide: Any = wide) -> float:
            moved, shifted = jax.tree.map(lambda leaf, one: leaf + step * one, wide, way)
            return float(np.sum(transcribed(moved, shifted, None) * weigh))

        expected = (at(1e-5) - at(-1e-5)) / 2e-5
        slope = sum(jax.tree.leaves(jax.tree.map(lambda g, one: float(np.sum(np.asarray(g) * one)), found, way)))
        assert slope == pytest.approx(expected, rel=2e-3, abs=2e-2)


def model(**changes: Any) -> LanguageModel:
    config = dataclasses.replace(CONFIG, **changes)
    params = Transformer(config).init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    rng = np.random.default_rng(0)
    return LanguageModel(config, jax.tree.map(lambda x: x + 0.2 * jnp.asarray(rng.standard_normal(x.shape)), params))


@pytest.mark.parametrize("method", ["full", "streaming"])
def test_prefill_and_decode_equal_the_full_forward(method: str) -> None:
    ours = model()
    made = CacheMethod(recent=3, sinks=1, prefill="streaming" if method == "streaming" else "exact")
    context = prefill(ours, PROMPTS, made, reserve=4, dtype="float32", chunk=8)
    logits, cache = [context.logits], context.cache
    step = jax.jit(lambda layers, tokens: ours.apply(tokens, cache=layers))
    for i in range(4):
        more, layers = step(cache.layers, jnp.asarray(LATER[:, i : i + 1]))
        logits, cache = [*logits, more[:, 0]], cache.stepped(layers)
    rows, lengths = pad([prompt + LATER[b].tolist() for b, prompt in enumerate(PROMPTS)], 21)
    whole = jax.jit(lambda tokens: ours.apply(tokens)[0])(rows)
    for b, length in enumerate(lengths):
        expected = whole[b, length - 5 : length]
        scale = np.abs(expected).max()
        np.testing.assert_allclose(np.stack([x[b] for x in logits]) / scale, expected / scale, atol=1e-5)


def test_it_has_the_parameters_of_grouped_query_attention_and_a_number_per_token() -> None:
    ours, plain = model(), model(attention=GroupedQuery())
    assert jax.tree.structure(ours.params) == jax.tree.structure(plain.params)
    assert ours.num_params == plain.num_params
    sizes = [cache_dims(m, 2, 16, 48, "bfloat16") for m in (ours, plain)]
    for mine, other in zip(*sizes, strict=True):
        assert layer_bytes(parse("full"), mine) - layer_bytes(parse("full"), other) == 2 * 48 * 4
    small, whole = (ModelCache.init(parse(spec), sizes[0]) for spec in ("selective:tokens=8", "full"))
    assert small.layer_bytes == small.planned_bytes
    assert small.nbytes < whole.nbytes / 2


def test_capped_logits_are_refused() -> None:
    with pytest.raises(UsageError, match="attention_softcap"):
        dataclasses.replace(CONFIG, attention_softcap=5.0)
    with pytest.raises(UsageError, match="no selective attention"):
        prefill(model(attention=GroupedQuery()), PROMPTS, parse("selective:tokens=8"), reserve=4)
