"""Layers that read the keys and values of an earlier one."""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.cache.layer_cache import LayerCache
from kvjax.cache.methods import parse
from kvjax.cache.model_cache import ModelCache
from kvjax.cache.step import Step
from kvjax.engine.prefill import cache_dims
from kvjax.errors import UsageError
from kvjax.models.config import TransformerConfig
from kvjax.models.language_model import LanguageModel
from kvjax.models.transformer import Transformer
from kvjax.sharding import make_mesh
from kvjax.typing import Array

CONFIG = TransformerConfig(
    vocab_size=64,
    embed_dim=32,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=48,
    max_positions=96,
    qk_norm=True,
    kv_layers=(0, 0, 2, 0),
)
ROWS = [np.random.default_rng(3).integers(0, 64, n).tolist() for n in (21, 13)]
FED = 5


@functools.cache
def model(config: TransformerConfig = CONFIG) -> LanguageModel:
    params = Transformer(config).init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    return LanguageModel(config, jax.tree.map(lambda leaf: 3 * leaf if leaf.ndim > 1 else leaf, params))


def uncached(tokens: list[int]) -> Array:
    return jax.jit(lambda t: model().apply(t)[0])(jnp.asarray([tokens]))[0]


@pytest.mark.parametrize("prefill", ["exact", "streaming"])
def test_prefill_and_decode_are_the_full_pass(prefill: Literal["exact", "streaming"]) -> None:
    prompts, method = [row[:-FED] for row in ROWS], dataclasses.replace(parse("full"), prefill=prefill)
    context = kvjax.prefill(model(), prompts, method, reserve=FED, dtype="float32")
    cache, told = context.cache, [context.logits]
    step = jax.jit(lambda cache, token: model().apply(token, cache=cache.layers))
    for i in range(FED):
        logits, layers = step(cache, jnp.asarray([[row[i - FED]] for row in ROWS]))
        cache = cache.stepped(layers)
        told.append(logits[:, 0])
    for b, row in enumerate(ROWS):
        want = uncached(row)[-FED - 1 :]
        np.testing.assert_allclose(jnp.stack(told)[:, b], want, rtol=0, atol=1e-5 * float(jnp.abs(want).max()))


def test_only_owners_have_caches_and_projections() -> None:
    context = kvjax.prefill(model(), ROWS, "int8", reserve=8)
    assert len(context.cache.layers) == 2 == len(CONFIG.owners)
    assert context.cache.layer_bytes == context.cache.planned_bytes
    everyone = kvjax.prefill(model(dataclasses.replace(CONFIG, kv_layers=())), ROWS, "int8", reserve=8)
    assert 2 * context.cache.nbytes == everyone.cache.nbytes
    has_keys = [{"k", "v"} <= set(model().params[f"layers_{i}"]["attention"]) for i in range(4)]
    assert has_keys == [True, False, True, False]


@pytest.mark.parametrize(
    "method", ["h2o:share=50%", "snapkv:share=50%,window=4+int4:group=8", "kivi-2:group=8,residual=8"]
)
def test_methods_compress_what_is_shared(method: str) -> None:
    said = kvjax.generate(model(), ROWS, method, max_new_tokens=8, dtype="float32")
    assert all(len(row) == 8 for row in said.tokens)
    for row, tokens in zip(ROWS, said.tokens, strict=True):
        assert kvjax.generate(model(), row, method, max_new_tokens=8, dtype="float32").tokens == [tokens]


def test_a_layer_that_shares_with_nobody_is_as_without_sharing() -> None:
    own = dataclasses.replace(CONFIG, kv_layers=(0, 1, 2, 3))
    params = model(own).params
    plain = Transformer(dataclasses.replace(CONFIG, kv_layers=())).apply({"params": params}, jnp.asarray(ROWS[:1]))[0]
    np.testing.assert_array_equal(model(own).apply(jnp.asarray(ROWS[:1]))[0], plain)


def test_gradients_reach_shared_keys_from_every_reader() -> None:
    """Finite differences of the loss along one direction of the owner's key projection."""
    tokens = jnp.asarray(ROWS[:1])

    def loss(kernel: Array) -> Array:
        params = jax.tree.map(lambda x: x, model().params)
        params["layers_0"]["attention"]["k"]["kernel"] = kernel
        logits = Transformer(CONFIG).apply({"params": params}, tokens)[0]
        return -jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], axis=-1).mean()

    kernel = model().params["layers_0"]["attention"]["k"]["kernel"]
    way = jax.random.normal(jax.random.key(1), kernel.shape)
    told, run = jax.grad(loss)(kernel), jax.jit(loss)
    change = (run(kernel + 1e-2 * way) - run(kernel - 1e-2 * way)) / 2e-2
    np.testing.assert_allclose(jnp.vdot(told, way), change, rtol=2e-2)


def test_a_decode_step_updates_the_shared_cache_in_place() -> None:
    """Tokens are stored when all layers have read: otherwise the donated stores would be copied."""

    def memory(config: TransformerConfig) -> tuple[int, int]:
        cache = jax.eval_shape(lambda: ModelCache.init(parse("int8"), cache_dims(model(config), 1, 1024, 8192)))
        cache = dataclasses.replace(cache, layers=tuple(layer.in_phase("decode") for layer in cache.layers))

        def step(cache: ModelCache, token: Array) -> tuple[Array, ModelCache]:
            logits, layers = model(config).apply(token, cache=cache.layers)
            return logits, cache.stepped(layers)

        token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
        found = jax.jit(step, donate_argnums=0).lower(cache, token).compile().memory_analysis()
        return found.alias_size_in_bytes, found.temp_size_in_bytes

    stores = 2 * 2 * 2 * 8192 * 8  # of the two owners
    alias, temporaries = memory(CONFIG)
    assert alias >= stores
    assert temporaries <= memory(dataclasses.replace(CONFIG, kv_layers=()))[1] + stores // 8


@pytest.mark.parametrize(
    ("kv_layers", "reason"),
    [
        ((0, 0), "2 entries for 4 layers"),
        ((0, 2, 2, 2), "an earlier one that reads its own"),
        ((0, 0, 1, 1), "an earlier one that reads its own"),
    ],
)
def test_maps_that_cannot_be_are_refused(kv_layers: tuple[int, ...], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        dataclasses.replace(CONFIG, kv_layers=kv_layers)


def test_windows_differ_and_a_mesh_are_refused() -> None:
    with pytest.raises(UsageError, match="another window"):
        dataclasses.replace(CONFIG, windows=(None, 8, None, None))
    with pytest.raises(UsageError, match="without a mesh"):
        kvjax.prefill(model().on_mesh(make_mesh(data=1, model=1)), ROWS, "full", reserve=8)


def test_reading_changes_nothing() -> None:
    """`read` then `store` is `step`."""
    dims = cache_dims(model(), 1, 8, 16, "float32")[0]
    cache = LayerCache.init(parse("full"), dims)
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((1, 8, n, 8)), jnp.float32) for n in (4, 2, 2))
    step = Step(q, k, v, jnp.arange(8, dtype=jnp.int32)[None], jnp.ones((1, 8), bool), scale=0.3)
    output, store = cache.read(step)
    again, after = cache.step(step)
    np.testing.assert_array_equal(output, again)
    jax.tree.map(np.testing.assert_array_equal, store(output), after)
