"""Selective self-attention: the transcription, its forms, what it costs, and positions behind a cache."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.attention import GroupedQuery, SelfSelective
from kvjax.attention.rope import RopeConfig
from kvjax.cache.step import Step
from kvjax.engine.prefill import cache_dims
from kvjax.errors import UsageError
from kvjax.models.config import TransformerConfig
from kvjax.models.language_model import LanguageModel
from kvjax.models.transformer import Transformer
from kvjax.sharding import make_mesh, param_specs, place, shard_cache
from tests.attention.decoding import assert_agree, attention_of, config_of, model_of, through_cache, whole
from tests.oracles.selfselective import attend_with_temperature, gelu

THETA = 100.0
KINDS = {
    "paper": SelfSelective(),
    "input": SelfSelective(features="input"),
    "released": SelfSelective(form="released"),
    "released linear": SelfSelective(form="released linear"),
}
SLOPES = {
    "paper": lambda alpha: 1 / (1 + math.exp(-alpha)),
    "released": lambda beta: math.exp(-math.exp(beta)),
    "released linear": lambda beta: beta,
}


@pytest.mark.parametrize("name", KINDS)
def test_the_transcription(name: str) -> None:
    kind = KINDS[name]
    params, apply = attention_of(kind, config_of(kind).attention_config(0), 32)
    x = np.random.default_rng(1).standard_normal((2, 9, 32))
    out = jax.jit(apply)(params, jnp.asarray(x, jnp.float32), RopeConfig(THETA).table(8, jnp.int32(9)))
    weights = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    slope = SLOPES[kind.form](float(weights["position"]))
    assert ("query_token" in weights) == (kind.form == "paper")
    for b in range(2):
        q, k, v = (np.einsum("td,dnh->tnh", x[b], weights[part]["kernel"]) for part in "qkv")

        def of_token(part: str, projected: np.ndarray, i: int, b: int = b) -> float:
            if kind.form != "paper":
                return 0.0
            features = x[b, i] if kind.features == "input" else gelu(projected[i])
            return math.tanh((features * weights[part]).sum())

        read = attend_with_temperature(
            q,
            k,
            v,
            lambda i, q=q: of_token("query_token", q, i) + 1 + slope * math.log(i + 1),
            lambda j, v=v: 1 + of_token("value_token", v, j),
            theta=THETA,
        )
        expected = np.einsum("tnh,nhd->td", read, weights["o"]["kernel"])
        np.testing.assert_allclose(out[b], expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("name", "start"), [("paper", -math.inf), ("input", -math.inf), ("released", math.inf), ("released linear", 0.0)]
)
def test_at_its_identity_it_is_grouped_query_attention(name: str, start: float) -> None:
    """A new model with this start and the other parameters of a grouped one: the same bits."""
    plain = model_of(config_of(GroupedQuery(), num_layers=1))
    config = config_of(dataclasses.replace(KINDS[name], start=start), num_layers=1)
    fresh = jax.jit(Transformer(config).init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    attention = {**fresh["layers_0"]["attention"], **plain.params["layers_0"]["attention"]}
    layer = {**plain.params["layers_0"], "attention": attention}
    same = LanguageModel(config, {**plain.params, "layers_0": layer})
    np.testing.assert_array_equal(whole(same), whole(plain))
    assert cache_dims(same, 2, 8, 16) == cache_dims(plain, 2, 8, 16), "the cache is the same"


def test_a_new_model_is_near_its_identity() -> None:
    """All forms start with log n times 0.011."""
    for kind in KINDS.values():
        assert float(kind.slope(jnp.float32(kind.first))) == pytest.approx(0.0112, abs=3e-4)


@pytest.mark.parametrize(
    ("name", "method", "chunk"),
    [
        ("paper", "full", 20),
        ("input", "actqkv:tokens=64,page=8,recent=4", 5),
        ("released", "full", 20),
        pytest.param("paper", "actqkv:tokens=64,page=8,recent=4", 5, marks=pytest.mark.slow),
    ],
)
def test_through_a_cache_as_without_one(name: str, method: str, chunk: int) -> None:
    """Positions are those of the text, in chunks and behind padding too; values are gated before they are stored."""
    model = model_of(config_of(KINDS[name], num_layers=1))
    prompt, later, cache = through_cache(model, method, chunk)
    assert_agree(model, whole(model), prompt, later)
    assert cache.layer_bytes == cache.planned_bytes
    plain = model_of(config_of(GroupedQuery(), num_layers=1))
    assert cache_dims(model, 2, 8, 16) == cache_dims(plain, 2, 8, 16)


class Probe:
    """Takes the place of a layer's cache and keeps the queries."""

    def step(self, step: Step) -> tuple[jax.Array, jax.Array]:
        return jnp.zeros((*step.queries.shape[:3], step.values.shape[-1])), step.queries


def test_positions_are_those_of_the_text() -> None:
    """Whatever a cache holds: tokens that begin at position 100 have the temperature of 101 and on."""
    kind = SelfSelective(form="released linear", start=0.5)
    config = config_of(kind).attention_config(0)
    params, _ = attention_of(kind, config, 32)
    x = jnp.asarray(np.random.default_rng(3).standard_normal((1, 12, 32)), jnp.float32)
    at = jnp.arange(100, 112, dtype=jnp.int32)[None]
    module = kind.module(config, jnp.float32, "attention")
    _, queries = module.apply({"params": params}, x, positions=at, valid=at >= 0, rope=None, cache=Probe())
    plain = jnp.einsum("btd,dnh->btnh", x, params["q"]["kernel"])
    factor = 1 + float(params["position"]) * np.log(np.arange(101, 113))
    np.testing.assert_allclose(queries, plain * factor[None, :, None, None], rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["paper", pytest.param("released", marks=pytest.mark.slow)])
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    """Of every parameter, along a random direction."""
    kind = KINDS[name]
    params, apply = attention_of(kind, config_of(kind).attention_config(0), 32)
    x, weights = (np.random.default_rng(i).standard_normal((2, 6, 32)).astype(np.float32) for i in (4, 5))
    loss = jax.jit(lambda params: (weights * apply(params, x)).sum())
    gradient, rng = jax.grad(loss)(params), np.random.default_rng(6)
    for (path, leaf), own in zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(gradient), strict=True):
        direction = rng.standard_normal(leaf.shape)
        step = jax.tree_util.tree_map_with_path(
            lambda other, x, path=path, way=0.01 * direction / np.linalg.norm(direction): (
                way if other == path else 0 * x
            ),
            params,
        )
        above, below = (float(loss(jax.tree.map(lambda x, by, s=s: x + s * by, params, step))) for s in (1, -1))
        expected = float((own * direction).sum() / np.linalg.norm(direction))
        assert (above - below) / 0.02 == pytest.approx(expected, rel=0.02, abs=0.02), jax.tree_util.keystr(path)


REAL = TransformerConfig(
    vocab_size=4096,
    embed_dim=512,
    num_layers=4,
    num_heads=8,
    num_kv_heads=2,
    head_dim=64,
    mlp_dim=1536,
    max_positions=2048,
)


def parameters(config: TransformerConfig) -> int:
    shapes = jax.eval_shape(Transformer(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize(
    ("name", "per_layer"), [("paper", 512 + 128 + 1), ("input", 2 * 512 + 1), ("released", 1), ("released linear", 1)]
)
def test_it_costs_less_than_half_a_percent_of_the_parameters(name: str, per_layer: int) -> None:
    plain, ours = parameters(REAL), parameters(dataclasses.replace(REAL, attention=KINDS[name]))
    assert ours - plain == 4 * per_layer
    assert (ours - plain) / plain < 0.0005
    small = dataclasses.replace(
        REAL, embed_dim=64, num_heads=4, num_kv_heads=4, head_dim=16, mlp_dim=128, vocab_size=64
    )
    of_small = parameters(dataclasses.replace(small, attention=KINDS[name])) / parameters(small) - 1
    assert of_small < 0.005


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
@pytest.mark.parametrize("name", ["paper", pytest.param("input", marks=pytest.mark.slow)])
def test_on_a_2_by_4_mesh(name: str) -> None:
    model, mesh = model_of(config_of(KINDS[name], num_layers=1, num_kv_heads=4)), make_mesh(2, 4)
    spread = dataclasses.replace(model, params=place(model.params, param_specs(model.params, mesh), mesh))
    prompt, later, _ = through_cache(spread, put=lambda cache: shard_cache(cache, mesh))
    assert_agree(model, whole(model), prompt, later)


def test_a_token_that_is_gated_off_is_not_read() -> None:
    """tau_v = 0 where tanh(f) = -1: whatever looks at the token gets nothing from it."""
    kind = SelfSelective(features="input")
    params, apply = attention_of(kind, config_of(kind).attention_config(0), 32)
    x = jnp.asarray(np.random.default_rng(3).standard_normal((1, 4, 32)), jnp.float32).at[0, :, 0].set(0.0)
    x = x.at[0, 1, 0].set(1.0)
    params["value_token"] = jnp.zeros(32).at[0].set(-1e3)
    params["v"]["kernel"] = params["v"]["kernel"].at[0].set(0.0)
    changed = dict(params, v={"kernel": params["v"]["kernel"].at[0].set(7.0)})
    np.testing.assert_array_equal(apply(params, x), apply(changed, x))
    assert np.abs(apply(dict(changed, value_token=jnp.zeros(32)), x) - apply(params, x)).max() > 0.1


def test_settings_that_mean_nothing_are_refused() -> None:
    with pytest.raises(UsageError, match="unknown form"):
        SelfSelective(form="later")  # pyright: ignore[reportArgumentType]
    with pytest.raises(UsageError, match="unknown features"):
        SelfSelective(features="keys")  # pyright: ignore[reportArgumentType]
    with pytest.raises(UsageError, match="not a number"):
        SelfSelective(start=math.nan)
