"""DiffQKV: the transcription, what it equals, what its caches hold, and every kind of cache."""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.attention import AttentionKind, DiffQKV, GroupedQuery, SelfSelective
from kvjax.attention.rope import RopeConfig
from kvjax.cache.head_split import HeadSplit, empty_layer
from kvjax.cache.layout import CacheDims
from kvjax.cache.method import CacheMethod
from kvjax.cache.methods import parse, razor
from kvjax.cache.plan import layer_bytes
from kvjax.cache.policy.critical import projected_norms
from kvjax.cache.policy.seen import Tokens
from kvjax.cache.step import Step
from kvjax.calibration.gates import stream
from kvjax.engine.prefill import cache_dims
from kvjax.errors import UsageError
from kvjax.models.huggingface.own import read_own_config, write_own_config
from kvjax.models.language_model import LanguageModel
from kvjax.sharding import make_mesh, param_specs, place, shard_cache
from tests.attention.decoding import assert_agree, attention_of, config_of, model_of, through_cache, whole
from tests.cache.driver import QUICK, rope
from tests.oracles.diffqkv import diffqkv

SIGMA = DiffQKV(value_heads=4, key_dim=4, query_hidden=24, query_activation="silu")
THETA = 100.0


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


@pytest.mark.parametrize(
    ("kind", "activation"),
    [
        (DiffQKV(2), None),
        (DiffQKV(8, query_hidden=24), lambda x: x),
        (dataclasses.replace(SIGMA, value_heads=4), silu),
    ],
    ids=["grouped", "augmented", "sigma"],
)
def test_the_transcription(kind: DiffQKV, activation: Any) -> None:
    config = config_of(kind).attention_config(0)
    params, apply = attention_of(kind, config, 32)
    x = np.random.default_rng(1).standard_normal((2, 9, 32))
    table = RopeConfig(THETA).table(kind.rotary_dim(config), jnp.int32(9))
    out = jax.jit(apply)(params, jnp.asarray(x, jnp.float32), table)
    weights = {name: np.asarray(leaf["kernel"], np.float64) for name, leaf in params.items()}
    assert ("q_hidden" in weights) == (activation is not None)
    widen = (lambda row: activation(row @ weights["q_hidden"])) if activation else (lambda row: row)
    for b in range(2):
        v = weights["v"].reshape(32, kind.value_heads, 8)
        expected = diffqkv(x[b], weights["q"], weights["k"], v, weights["o"], theta=THETA, widen=widen)
        np.testing.assert_allclose(out[b], expected, atol=2e-5 * np.abs(expected).max())


def test_without_its_settings_it_is_grouped_query_attention() -> None:
    """Same parameters, same bits, same cache."""
    plain = model_of(config_of(GroupedQuery()))
    same = LanguageModel(config_of(DiffQKV(2)), plain.params)
    shapes = jax.tree.map(jnp.shape, model_of(same.config).params)
    assert shapes == jax.tree.map(jnp.shape, plain.params)
    np.testing.assert_array_equal(whole(plain), whole(same))
    assert cache_dims(plain, 2, 8, 16) == cache_dims(same, 2, 8, 16)


def copied(grouped: Any, parts: int) -> Any:
    """The parameters of grouped-query attention with as many kv heads as value heads: each key head `parts` times."""
    k, v = grouped["k"]["kernel"], grouped["v"]["kernel"]
    keys = jnp.repeat(k, parts, axis=1)
    return {**grouped, "k": {"kernel": keys}, "v": {"kernel": v.reshape(v.shape[0], v.shape[1] * parts, -1)}}


def test_key_heads_are_shared_by_value_heads_and_so_are_their_gradients() -> None:
    """Grouped-query attention whose key heads are copies is the same function, and has the same gradients."""
    kind, x = DiffQKV(4), jnp.asarray(np.random.default_rng(2).standard_normal((2, 7, 32)), jnp.float32)
    params, apply = attention_of(kind, config_of(kind).attention_config(0), 32)
    wide = config_of(GroupedQuery(), num_kv_heads=4)
    _, apply_wide = attention_of(wide.attention, wide.attention_config(0), 32)
    weights = jnp.asarray(np.random.default_rng(3).standard_normal(x.shape), jnp.float32)

    def loss(params: Any, x: jax.Array) -> jax.Array:
        return (weights * apply(params, x)).sum()

    def expected(params: Any, x: jax.Array) -> jax.Array:
        return (weights * apply_wide(copied(params, 2), x)).sum()

    ours, theirs = (jax.jit(jax.value_and_grad(f, (0, 1)))(params, x) for f in (loss, expected))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, np.abs(b).max()), rtol=0)


@pytest.mark.parametrize(("method", "chunk"), [("full", 20), ("actqkv:tokens=64,page=8,recent=4", 5)])
def test_through_a_cache_as_without_one(method: str, chunk: int) -> None:
    """Exact prefill, and a streaming one of which every page is read; ragged rows."""
    model = model_of(config_of(SIGMA))
    prompt, later, cache = through_cache(model, method, chunk)
    assert_agree(model, whole(model), prompt, later)
    assert cache.layer_bytes == cache.planned_bytes


@pytest.mark.parametrize(
    ("kind", "per_token"),
    [
        (DiffQKV(4), 2 * 8 + 4 * 8),
        (DiffQKV(8, key_dim=4), 2 * 4 + 8 * 8),
        (SIGMA, 2 * 4 + 4 * 8),
    ],
)
def test_what_a_cache_stores(kind: DiffQKV, per_token: int) -> None:
    """K · key_dim + n_v · H numbers per token, where grouped-query attention with n_v heads stores 2 · n_v · H."""
    ours, theirs = model_of(config_of(kind)), model_of(config_of(GroupedQuery(), num_kv_heads=kind.value_heads))
    sizes = []
    for model in (ours, theirs):
        dims = cache_dims(model, 3, 16, 32)[0]
        cache = jax.eval_shape(lambda dims=dims: empty_layer(parse("full"), dims))
        keys, values = (sum(x.size for x in jax.tree.leaves(store)) for store in cache.segments[0].stores)
        assert layer_bytes(parse("full"), dims) == sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
        sizes.append((keys, values))
    (keys, values), (all_keys, all_values) = sizes
    assert keys + values == 3 * 32 * per_token
    assert values == all_values and keys / all_keys == 2 * kind.rotary_dim(ours.config.attention_config(0)) / (
        kind.value_heads * 8
    )


def test_the_published_size() -> None:
    """Sigma 1.5B beside grouped-query attention with 16 kv heads: 20 of 32 head vectors, 37.5 % less."""
    config = config_of(DiffQKV(16, query_hidden=3072), num_heads=32, num_kv_heads=4, head_dim=64, embed_dim=2048)
    shape = dataclasses.asdict(config.cache_shape(0))
    sizes = {"batch": 1, "query_heads": 32, "max_length": 4096, "prompt_length": 4096}
    ours = layer_bytes(parse("full"), CacheDims(**sizes, **shape))
    theirs = layer_bytes(parse("full"), CacheDims(**sizes, kv_heads=16, head_dim=64))
    assert ours / theirs == pytest.approx(20 / 32, abs=1e-3)


# Groups of 8 channels: the scales are those of the value heads, as where each has a cache of its own.
SLOW = (
    "kivi-2:residual=8,group=8",
    "h2o:tokens=12",
    "snapkv:tokens=14,window=4",
    "mikv:tokens=12",
    "streaming_llm:tokens=12,positions=renumbered",
    "keydiff:tokens=12,recent=2",
    "snapkv:tokens=14,window=4+int4:group=8",
    "tova:tokens=12",
)
METHODS = (
    "int8:group=8",
    "adakv:tokens=14,window=4",
    "razor",
    "top_values:count=5",
    *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW),
)
LENGTHS = (24, 9, 17)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), compiler_options=QUICK)
def _outputs(method: str, dims: CacheDims, part: tuple[int, ...] | None, arrays: tuple, lengths: jax.Array) -> tuple:
    cache = empty_layer(_sized(method), dims, lengths)

    def step(cache: Any, arrays: tuple, valid: jax.Array) -> tuple:
        q, k, v = arrays
        positions = cache.length[:, None] + jnp.arange(q.shape[1], dtype=jnp.int32)
        return cache.step(Step(q, k, v, positions, valid, rope(q.shape[-1]), scale=0.5, value_part=part))

    first, cache = step(cache, tuple(x[:, :24] for x in arrays), jnp.arange(24) < lengths[:, None])

    def later(cache: Any, arrays: tuple) -> tuple:
        out, cache = step(cache, tuple(x[:, None] for x in arrays), jnp.ones((len(lengths), 1), bool))
        return cache, out[:, 0]

    return first, jax.lax.scan(later, cache, tuple(x[:, 24:].swapaxes(0, 1) for x in arrays))[1]


def _sized(method: str) -> CacheMethod:
    """The named method; razor with a local and a retrieval head, mikv with a scale per 8 channels."""
    if method == "razor":
        return razor(local=8, sinks=2, table=((1, 0),))
    made = parse(method)
    if not method.startswith("mikv"):
        return made
    codec = dataclasses.replace(made.fate.values, group=8)  # pyright: ignore[reportAttributeAccessIssue]
    return dataclasses.replace(made, fate=dataclasses.replace(made.fate, values=codec))


@pytest.mark.parametrize("method", METHODS)
def test_every_kind_of_cache(method: str) -> None:
    """Two value heads beside a key head read what each would from a cache of its own, which holds one of them."""
    rng, parts = np.random.default_rng(5), 2
    q = 2 * rng.standard_normal((3, 30, 8, 8)).astype(np.float32)
    k, v = (rng.standard_normal((3, 30, 2, size)).astype(np.float32) for size in (8, 16))
    dims = CacheDims(3, 2, 8, 8, 30, 24, "float32", value_dim=16)
    alone = dataclasses.replace(dims, value_dim=None)
    lengths = jnp.asarray(LENGTHS, jnp.int32)
    part = DiffQKV(4).value_part(config_of(DiffQKV(4)).attention_config(0))
    assert part == (0, 0, 1, 1, 0, 0, 1, 1)
    assert (method == "razor") == isinstance(empty_layer(_sized(method), dims), HeadSplit)
    ours = _outputs(method, dims, part, (q, k, v), lengths)
    single = [_outputs(method, alone, None, (q, k, v[..., 8 * i : 8 * i + 8]), lengths) for i in range(parts)]
    exists = np.arange(24) < np.array(LENGTHS)[:, None]
    for n in range(8):
        np.testing.assert_allclose(
            ours[0][:, :, n][exists], single[part[n]][0][:, :, n][exists], atol=1e-5, rtol=0, err_msg=f"head {n}"
        )
        np.testing.assert_allclose(ours[1][:, :, n], single[part[n]][1][:, :, n], atol=1e-5, rtol=0)


def test_streaming_attention_reads_the_part_of_a_query_head() -> None:
    """What gates are found with (DuoAttention): as of two layers, each with one value head beside a key head."""
    rng = np.random.default_rng(7)
    q, k, v = (jnp.asarray(rng.standard_normal((1, 9, *shape)), jnp.float32) for shape in ((8, 8), (2, 8), (2, 16)))
    at = jnp.arange(9, dtype=jnp.int32)[None]
    step = Step(q, k, v, at, at >= 0, scale=0.5, value_part=(0, 0, 1, 1) * 2)
    run = jax.jit(lambda step: stream(step, sinks=1, recent=3), compiler_options=QUICK)
    got = run(step)
    for part in range(2):
        alone = dataclasses.replace(step, values=v[..., 8 * part : 8 * part + 8], value_part=None)
        mine = np.array(step.value_part) == part
        np.testing.assert_allclose(got[:, :, mine], run(alone)[:, :, mine], atol=1e-6)


@pytest.mark.parametrize("kind", [SIGMA, SelfSelective(form="released linear", start=0.5)])
def test_configs_are_read_back(kind: AttentionKind) -> None:
    config = config_of(kind)
    assert read_own_config(json.loads(json.dumps(write_own_config(config, "float32")))) == config


def test_criticalkv_projects_the_part_that_a_query_head_reads() -> None:
    """Values enter its scores: as of copies of the key heads, of which each has its own value head."""
    rng = np.random.default_rng(6)
    q, k, v, o = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32)
        for shape in ((1, 5, 8, 8), (1, 5, 2, 8), (1, 5, 2, 16), (8, 8, 32))
    )
    at = jnp.arange(5, dtype=jnp.int32)[None]
    step = Step(q, k, v, at, at >= 0, output_projection=o, value_part=(0, 0, 1, 1) * 2)
    got = projected_norms(Tokens(step, jnp.arange(2)))
    for head in range(2):
        each = [v[0, :, head, 8 * (n // 2) : 8 * (n // 2) + 8] @ o[4 * head + n] for n in range(4)]
        np.testing.assert_allclose(got[0, head], np.mean([np.abs(x).sum(-1) for x in each], axis=0), rtol=1e-5)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
@pytest.mark.parametrize(
    ("kind", "kv_heads"),
    [(DiffQKV(8, key_dim=4, query_hidden=24), 4), pytest.param(SIGMA, 2, marks=pytest.mark.slow)],
    ids=["cut", "whole"],
)
def test_on_a_2_by_4_mesh(kind: DiffQKV, kv_heads: int) -> None:
    """Four key heads and eight value heads are cut together; two, which four devices do not divide, stay whole."""
    model, mesh = model_of(config_of(kind, num_layers=1, num_kv_heads=kv_heads)), make_mesh(2, 4)
    specs = param_specs(model.params, mesh)
    assert ("model" in str(specs["layers_0"]["attention"]["v"]["kernel"])) == (kv_heads == 4)
    spread = dataclasses.replace(model, params=place(model.params, specs, mesh))
    prompt, later, _ = through_cache(spread, "h2o:tokens=12", put=lambda cache: shard_cache(cache, mesh))
    assert "model" in str(specs["layers_0"]["mlp"]["up"]["kernel"])
    expected, after, _ = through_cache(model, "h2o:tokens=12")
    for ours, theirs in ((np.stack(later), np.stack(after)), (prompt[0], expected[0])):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max(), rtol=0)


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        (DiffQKV(3), {}, "not a multiple of num_kv_heads"),
        (DiffQKV(6), {}, "not a multiple of value_heads"),
        (DiffQKV(4, key_dim=3), {}, "odd"),
        (DiffQKV(4), {"kv_head_of_query": (0, 0, 0, 0, 1, 1, 1, 1)}, "leave kv_head_of_query out"),
    ],
)
def test_sizes_that_do_not_go_together_are_refused(kind: DiffQKV, changes: dict, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        config_of(kind, **changes)


def test_settings_that_mean_nothing_are_refused() -> None:
    with pytest.raises(UsageError, match="key_dim must be at least 1"):
        DiffQKV(4, key_dim=0)
    with pytest.raises(UsageError, match="query_activation"):
        DiffQKV(4, query_activation="tanh")  # pyright: ignore[reportArgumentType]
