"""Keys of all heads in one vector: through caches, beside grouped-query attention, and in bytes."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.attention import GroupedQuery, ProjectedKeys
from kvjax.cache.method import CacheMethod
from kvjax.cache.methods import parse
from kvjax.cache.model_cache import ModelCache
from kvjax.cache.segment import Segment
from kvjax.engine.prefill import cache_dims
from kvjax.errors import UsageError
from kvjax.models.config import TransformerConfig
from kvjax.models.language_model import LanguageModel
from kvjax.models.transformer import Transformer

CONFIG = TransformerConfig(
    vocab_size=40,
    embed_dim=32,
    num_layers=1,
    num_heads=8,
    num_kv_heads=4,
    head_dim=8,
    mlp_dim=32,
    max_positions=64,
    attention=ProjectedKeys(2),
    windows=(12,),
    qk_norm=True,
    qkv_bias=True,
    attention_softcap=20.0,
)
ROWS = [np.random.default_rng(i).integers(0, CONFIG.vocab_size, n).tolist() for i, n in enumerate((23, 17))]


def make(config: TransformerConfig) -> LanguageModel:
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(Transformer(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]

    def draw(path: Any, struct: Any) -> jax.Array:
        name, x = jax.tree_util.keystr(path), rng.standard_normal(struct.shape)
        if "key_basis" in name:
            x = np.linalg.qr(x.reshape(-1, x.shape[-1]))[0].reshape(x.shape)
        return jnp.asarray(1 + 0.1 * x if "scale" in name else x if "basis" in name or "embed" in name else 0.3 * x)

    params = jax.tree_util.tree_map_with_path(draw, shapes)
    return LanguageModel(config, jax.tree.map(lambda x: x.astype(jnp.float32), params))


apply = jax.jit(LanguageModel.apply)


def alone(model: LanguageModel, row: list[int]) -> np.ndarray[Any, Any]:
    return np.asarray(apply(model, jnp.asarray([row]))[0][0])


def replay(model: LanguageModel, method: CacheMethod, sizes: list[int]) -> list[np.ndarray[Any, Any]]:
    """The logits of each row, fed in pieces of these sizes and then token by token; all rows in one cache."""
    longest = max(map(len, ROWS))
    lengths = jnp.asarray([min(sizes[0], len(row)) for row in ROWS], jnp.int32)
    cache = ModelCache.init(method, cache_dims(model, len(ROWS), sizes[0], longest, "float32"), lengths)
    found: list[list[Any]] = [[] for _ in ROWS]
    done = 0
    for size in [*sizes, *[1] * (longest - sum(sizes))]:
        tokens = np.full((len(ROWS), size), CONFIG.vocab_size - 1, np.int32)
        valid = np.zeros(tokens.shape, bool)
        for r, row in enumerate(ROWS):
            piece = row[done : done + size]
            tokens[r, : len(piece)], valid[r, : len(piece)] = piece, True
        logits, layers = apply(model, jnp.asarray(tokens), cache=cache, valid=jnp.asarray(valid))
        cache = cache.stepped(layers)
        for r in range(len(ROWS)):
            found[r].extend(np.asarray(logits)[r][valid[r]])
        done += size
    return [np.stack(rows) for rows in found]


@pytest.mark.parametrize(
    ("method", "sizes"),
    [("full", [11]), ("streaming", [8, 5, 8]), ("one token", [1])],
    ids=["exact", "streaming", "decode only"],
)
def test_caches_change_nothing(method: str, sizes: list[int]) -> None:
    model = make(CONFIG)
    chosen = CacheMethod(prefill="streaming") if method == "streaming" else CacheMethod()
    for row, found in zip(ROWS, replay(model, chosen, sizes), strict=True):
        expected = alone(model, row)
        assert abs(found - expected).max() <= 1e-5 * abs(expected).max()


def identity(model: LanguageModel) -> LanguageModel:
    """The grouped-query model as one with projected keys, the projection being none."""
    config = dataclasses.replace(model.config, attention=ProjectedKeys(model.config.num_kv_heads))
    basis = jnp.eye(32).reshape(4, 8, 32)
    layer = model.params["layers_0"]
    changed = {"layers_0": layer | {"attention": layer["attention"] | {"key_basis": basis}}}
    return dataclasses.replace(model, config=config, params=model.params | changed)


def loss(params: Any, model: LanguageModel) -> jax.Array:
    logits, _ = dataclasses.replace(model, params=params).apply(jnp.asarray([ROWS[0]]))
    return -jnp.mean(jax.nn.log_softmax(logits[0, :-1])[jnp.arange(22), jnp.asarray(ROWS[0][1:])])


def test_without_a_projection_it_is_grouped_query_attention_with_the_same_gradients() -> None:
    grouped = make(dataclasses.replace(CONFIG, attention=GroupedQuery()))
    same = identity(grouped)
    expected = alone(grouped, ROWS[0])
    assert abs(alone(same, ROWS[0]) - expected).max() <= 1e-5 * abs(expected).max()
    one, other = (jax.jit(jax.grad(loss))(model.params, model) for model in (grouped, same))
    other["layers_0"]["attention"].pop("key_basis")
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert abs(a - b).max() <= 1e-4 * abs(a).max()


def test_the_gradient_of_the_projection() -> None:
    """Against central differences, along its own direction and a random one."""
    model = make(CONFIG)
    value = jax.jit(loss)
    gradient = jax.jit(jax.grad(loss))(model.params, model)["layers_0"]["attention"]["key_basis"]
    random = jax.random.normal(jax.random.key(2), gradient.shape)
    for direction in (gradient, random):
        direction = direction / jnp.linalg.norm(direction)

        def moved(step: float, direction: jax.Array = direction) -> float:
            layer = model.params["layers_0"]
            changed = layer["attention"] | {"key_basis": layer["attention"]["key_basis"] + step * direction}
            return float(value(model.params | {"layers_0": layer | {"attention": changed}}, model))

        numeric = (moved(0.02) - moved(-0.02)) / 0.04
        assert abs(numeric - float(jnp.sum(gradient * direction))) <= 0.02 * float(jnp.linalg.norm(gradient))


def test_bytes() -> None:
    """Two of four heads: half of the numbers, and what the method declares is what is allocated."""
    model = make(CONFIG)
    grouped = dataclasses.replace(model, config=dataclasses.replace(CONFIG, attention=GroupedQuery()))
    method = parse("full")
    ours, theirs = (ModelCache.init(method, cache_dims(one, 2, 16, 32, "float32")) for one in (model, grouped))
    assert ours.layer_bytes == ours.planned_bytes
    stored, before = (keys_and_values(one) for one in (ours, theirs))
    assert 2 * sum(leaf.nbytes for leaf in stored) == sum(leaf.nbytes for leaf in before)
    assert {leaf.shape[1] for leaf in stored} == {1} and {leaf.shape[1] for leaf in before} == {4}


def keys_and_values(cache: ModelCache) -> list[jax.Array]:
    segments = cache.layers[0].segments
    return jax.tree.leaves([(s.keys, s.values) for s in segments if isinstance(s, Segment)])


def test_a_16_bit_model_starts() -> None:
    config = CONFIG
    params = jax.jit(Transformer(config, jnp.bfloat16).init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    basis = params["layers_0"]["attention"]["key_basis"]
    assert basis.shape == (4, 8, 16) and basis.dtype == jnp.bfloat16
    gram = jnp.einsum("khr,khs->rs", *[basis.astype(jnp.float32)] * 2)
    np.testing.assert_allclose(gram, np.eye(16), atol=0.02)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attention": ProjectedKeys(3)}, "4 key heads are not a multiple of heads=3"),
        ({"attention": ProjectedKeys(0)}, "heads=0"),
        ({"kv_head_of_query": (0, 1) * 4}, "no query head of .* reads the last of 2 value heads"),
    ],
)
def test_what_does_not_fit_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        dataclasses.replace(CONFIG, **fields)
