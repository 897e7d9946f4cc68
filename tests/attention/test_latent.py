"""Latent attention: against the paper's equations, through caches, beside the same attention with whole keys."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.attention import AttentionConfig, GroupedQuery, MultiHeadLatent
from kvjax.attention.rope import RopeConfig
from kvjax.cache.methods import parse
from kvjax.cache.model_cache import ModelCache
from kvjax.engine.prefill import cache_dims
from kvjax.errors import UsageError
from kvjax.models.config import TransformerConfig
from kvjax.models.transformer import Transformer
from kvjax.sharding import param_specs
from kvjax.typing import Array, PyTree
from tests.attention.decoding import (
    PROMPT,
    STEPS,
    assert_agree,
    attention_of,
    config_of,
    model_of,
    through_cache,
    whole,
)
from tests.cache.driver import QUICK
from tests.oracles import latent as oracle

N, R, C, H, D = 4, 16, 4, 8, 32
PLAIN = MultiHeadLatent(R, C)
QUERIES = MultiHeadLatent(R, C, query_dim=12, value_dim=6, scale_factor=1.3, norm_eps=1e-2)
SIZES: dict[str, Any] = {"num_heads": N, "num_kv_heads": N, "head_dim": H}


def config(kind: MultiHeadLatent, **changes: Any) -> TransformerConfig:
    return config_of(kind, **(SIZES | changes))


def as_paper(params: PyTree) -> dict[str, Any]:
    """A layer's parameters under the paper's names."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    low = "q_latent" in params
    return {
        "W_DKV": params["latent"]["kernel"],
        "W_KR": params["rotary_key"]["kernel"],
        "W_UK": params["up_keys"],
        "W_UV": params["up_values"],
        "W_Q": params["q"]["kernel"],
        "W_O": params["o"]["kernel"],
        "norm": params["latent_norm"]["scale"],
        "W_DQ": params["q_latent"]["kernel"] if low else None,
        "q_norm": params["q_latent_norm"]["scale"] if low else None,
    }


def layer(kind: MultiHeadLatent, seed: int = 0) -> tuple[PyTree, Any]:
    sizes = AttentionConfig(scale=H**-0.5, **SIZES)
    params, apply = attention_of(kind, sizes, D, seed)
    rng = np.random.default_rng(9)
    for name in params.keys() & {"latent_norm", "q_latent_norm"}:
        params[name]["scale"] += 0.3 * rng.standard_normal(params[name]["scale"].shape).astype(np.float32)
    return params, apply


@pytest.mark.parametrize("kind", [PLAIN, QUERIES], ids=["plain", "query latent"])
def test_a_layer_equals_the_papers_equations(kind: MultiHeadLatent) -> None:
    params, apply = layer(kind)
    x = np.random.default_rng(1).standard_normal((2, 9, D)).astype(np.float32)
    rope = RopeConfig(50.0).table(C, jnp.int32(9))
    out = jax.jit(apply, compiler_options=QUICK)(params, jnp.asarray(x), rope)
    for row in range(2):
        expected = oracle.attend(
            x[row].astype(np.float64),
            as_paper(params),
            theta=50.0,
            eps=kind.norm_eps or 1e-6,
            factor=kind.scale_factor,
        )
        np.testing.assert_allclose(out[row], expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("method", "chunk"),
    [
        ("full", PROMPT),
        ("streaming_llm:tokens=100", PROMPT),
        ("h2o:tokens=100", 5),  # its prefill streams
        ("streaming_llm:tokens=100,positions=renumbered", 5),
    ],
)
def test_caches_equal_the_whole_forward_pass(method: str, chunk: int) -> None:
    model = model_of(config(dataclasses.replace(QUERIES, norm_eps=None)))
    prompt, later, _ = through_cache(model, method, chunk)
    assert_agree(model, whole(model), prompt, later)


def test_windows_biases_and_caps_go_through_caches() -> None:
    model = model_of(config(PLAIN, windows=(6, None), qkv_bias=True, output_bias=True, attention_softcap=5.0))
    prompt, later, _ = through_cache(model)
    assert_agree(model, whole(model), prompt, later)


def test_what_is_cached_is_the_latent_and_the_key() -> None:
    """512 + 64 numbers per token in DeepSeek-V2, where multi-head attention has 2 · 128 · 128."""
    model = model_of(config(PLAIN))
    cache = ModelCache.init(parse("full"), cache_dims(model, 1, 64, 96))
    heads = ModelCache.init(parse("full"), cache_dims(model_of(config_of(GroupedQuery(), **SIZES)), 1, 64, 96))
    assert cache.layer_bytes == cache.planned_bytes
    assert stored(cache) * 2 * N * H == stored(heads) * (R + C)
    assert stored(cache) == 2 * 2 * 96 * (R + C)


def stored(cache: ModelCache) -> int:
    """Bytes of tokens, over all layers."""
    segments = (segment for layer in cache for segment in layer.segments)
    return sum(leaf.nbytes for segment in segments for leaf in jax.tree.leaves(segment.stores))


def test_gradients_equal_finite_differences() -> None:
    params, apply = layer(QUERIES)
    rng = np.random.default_rng(1)
    x, target = (jnp.asarray(rng.standard_normal((1, 6, D)), jnp.float32) for _ in range(2))
    rope = RopeConfig(50.0).table(C, jnp.int32(6))

    def plain(params: PyTree, x: Array) -> Array:
        return jnp.vdot(apply(params, x, rope), target)

    loss = jax.jit(plain, compiler_options=QUICK)
    gradients = jax.tree.leaves(jax.jit(jax.grad(plain, argnums=(0, 1)), compiler_options=QUICK)(params, x))
    leaves, tree = jax.tree.flatten((params, x))
    for i, (leaf, gradient) in enumerate(zip(leaves, gradients, strict=True)):
        along = rng.standard_normal(leaf.shape).astype(np.float32)
        along = 0.01 * along / np.linalg.norm(along)
        ends = [loss(*jax.tree.unflatten(tree, [*leaves[:i], leaf + e * along, *leaves[i + 1 :]])) for e in (1, -1)]
        measured, expected = float(ends[0] - ends[1]) / 0.02, float(np.sum(gradient * along)) / 0.01
        assert abs(measured - expected) < 5e-3 * float(jnp.linalg.norm(gradient))


def test_a_mesh_that_cuts_heads_keeps_the_latent_and_its_maps_whole() -> None:
    shapes = jax.eval_shape(Transformer(config(QUERIES)).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    specs = param_specs(shapes["params"], jax.sharding.AbstractMesh((2, 2), ("data", "model")))  # pyright: ignore[reportArgumentType]
    assert all(not any(spec) for spec in jax.tree.leaves(specs["layers_0"]["attention"]))
    assert specs["layers_0"]["mlp"]["up"]["kernel"] == jax.sharding.PartitionSpec(None, "model")


def test_refusals() -> None:
    with pytest.raises(UsageError, match="num_kv_heads is num_heads"):
        config(PLAIN, num_kv_heads=2)
    with pytest.raises(UsageError, match="qk_norm"):
        config(PLAIN, qk_norm=True)
    with pytest.raises(UsageError, match="scale_factor"):
        config(PLAIN, attention_scale=0.7)
    with pytest.raises(UsageError, match="latent_dim must be positive"):
        MultiHeadLatent(0, 4)
    with pytest.raises(UsageError, match="odd"):
        config(MultiHeadLatent(8, 3))


@pytest.mark.parametrize("method", ["cam:tokens=12", "quest", "think", "mikv:tokens=12"])
def test_methods_that_cannot_read_latents_say_so(method: str) -> None:
    with pytest.raises(UsageError, match=r"latents|stored as values"):
        ModelCache.init(parse(method), cache_dims(model_of(config(PLAIN)), 1, PROMPT, PROMPT + STEPS))
