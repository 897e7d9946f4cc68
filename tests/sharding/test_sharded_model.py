"""The Transformer on a (data, model) mesh: same logits, and no communication but tensor parallelism's own."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from kvjax.cache.layout import CacheDims
from kvjax.cache.methods import parse
from kvjax.cache.model_cache import ModelCache
from kvjax.models.config import TransformerConfig
from kvjax.models.transformer import Transformer
from kvjax.sharding import describe, make_mesh, param_specs, place, shard_cache
from tests.save.driver import FAST_COMPILE
from tests.sharding.hlo import collectives

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")

LAYERS = 2
CONFIG = TransformerConfig(
    vocab_size=64,
    embed_dim=32,
    num_layers=LAYERS,
    num_heads=8,
    num_kv_heads=4,
    head_dim=16,
    mlp_dim=64,
    max_positions=64,
)
B, PROMPT, STEPS = 4, 24, 4
LENGTHS = np.array([24, 9, 17, 3], np.int32)
TOKENS = np.random.default_rng(0).integers(0, 64, (B, PROMPT + STEPS), np.int32)


@functools.cache
def params_of(config: TransformerConfig):
    init = jax.jit(Transformer(config).init, compiler_options=FAST_COMPILE)
    return init(jax.random.key(0), TOKENS[:, :2])["params"]


def empty_cache(config: TransformerConfig, method: str = "h2o:tokens=16") -> ModelCache:
    dims = [
        CacheDims(B, config.num_kv_heads, config.num_heads, config.head_dim, PROMPT + STEPS, PROMPT, "float32", None, i)
        for i in range(config.num_layers)
    ]
    return ModelCache.init(parse(method), dims, jnp.asarray(LENGTHS))


def forward(config, params, cache, tokens, lengths):
    """The tokens of each row that exist, appended: logits f32 [B, V] after the last one, and the layer caches."""
    valid = jnp.arange(tokens.shape[1]) < lengths[:, None]
    logits, cache = Transformer(config).apply(
        {"params": params}, tokens, cache=cache, valid=valid, logits_at=jnp.maximum(lengths - 1, 0)
    )
    return logits[:, 0], cache


def run(config, params, cache, put=lambda x: x):
    """Prefill and STEPS decode steps; logits [1 + STEPS, B, V] and the two compiled programs."""
    step = functools.partial(forward, config)
    args = params, cache.layers, put(TOKENS[:, :PROMPT]), put(LENGTHS)
    prefill = jax.jit(step).lower(*args).compile(FAST_COMPILE)
    logits, layers = prefill(*args)
    all_logits, decode = [logits], None
    for i in range(STEPS):
        args = params, layers, put(TOKENS[np.arange(B), LENGTHS + i][:, None]), put(np.ones(B, np.int32))
        decode = decode or jax.jit(step, donate_argnums=1).lower(*args).compile(FAST_COMPILE)
        logits, layers = decode(*args)
        all_logits.append(logits)
    return np.stack([np.asarray(x) for x in all_logits]), prefill, decode


def run_on_mesh(config, cache: ModelCache):
    """`run` on a 2 by 4 mesh."""
    mesh = make_mesh(2, 4)
    params = place(params_of(config), param_specs(params_of(config), mesh), mesh)
    return run(config, params, shard_cache(jax.tree.map(np.asarray, cache), mesh), lambda x: place(x, P("data"), mesh))


def test_prefill_and_decode_exchange_only_the_sums_of_tensor_parallelism() -> None:
    """One all-reduce after attention and one after the MLP of each layer, and one of the embedding's lookup."""
    logits, prefill, decode = run_on_mesh(CONFIG, empty_cache(CONFIG))
    assert collectives(prefill) == {"all-reduce": 2 * LAYERS + 1}
    assert collectives(decode) == {"all-reduce": 2 * LAYERS + 1}
    np.testing.assert_allclose(logits, run(CONFIG, params_of(CONFIG), empty_cache(CONFIG))[0], rtol=0, atol=1e-5)


def test_kv_heads_that_the_axis_does_not_divide_are_replicated_and_said_so() -> None:
    config = dataclasses.replace(CONFIG, num_kv_heads=2, num_layers=1)
    logits, _, decode = run_on_mesh(config, empty_cache(config, "full"))
    assert collectives(decode) == {"all-reduce": 2}, "attention is replicated; the MLP and the embedding are not"
    uncached = jax.jit(lambda params: Transformer(config).apply({"params": params}, TOKENS)[0])(params_of(config))
    want = np.asarray(uncached)[np.arange(B), LENGTHS - 1 + np.arange(STEPS + 1)[:, None]]
    np.testing.assert_allclose(logits, want, rtol=0, atol=1e-5)
    mesh = make_mesh(2, 4)
    text = describe(params_of(config), empty_cache(config), mesh)
    assert "replicated: kv_heads 2 is not a multiple of model=4" in text
    assert "replicated" not in describe(params_of(CONFIG), empty_cache(CONFIG), mesh)


def test_the_plan_counts_what_devices_hold() -> None:
    mesh = make_mesh(2, 4)
    params = place(params_of(CONFIG), param_specs(params_of(CONFIG), mesh), mesh)
    cache = shard_cache(empty_cache(CONFIG), mesh)
    lines = describe(params, cache, mesh).splitlines()
    assert lines[0] == "mesh data=2, model=4 on 8 cpu devices"
    for line, tree in zip(lines[1:], (params, cache), strict=True):
        leaves = jax.tree.leaves(tree)
        here = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
        assert line.endswith(f": {sum(x.nbytes for x in leaves):,} bytes, {here:,} on each device")


def test_every_parameter_has_its_place() -> None:
    """With every option on, only norms and the biases of summed outputs are replicated."""
    config = dataclasses.replace(
        CONFIG, num_layers=1, qkv_bias=True, output_bias=True, mlp_bias=True, qk_norm=True, sandwich_norm=True
    )
    shapes = jax.eval_shape(lambda: Transformer(config).init(jax.random.key(0), TOKENS)["params"])
    specs = param_specs(shapes, make_mesh(2, 4))
    found = {
        jax.tree_util.keystr(path[-2:], simple=True, separator="/"): spec
        for path, spec in jax.tree_util.tree_leaves_with_path(specs)
    }
    summed = {name for name in found if name.endswith("norm/scale")} | {"o/bias", "down/bias"}
    assert {name for name, spec in found.items() if spec == P()} == summed
    assert found["q/kernel"] == found["k/kernel"] == found["v/kernel"] == P(None, "model", None)
    assert found["q/bias"] == found["k/bias"] == P("model", None)
    assert found["o/kernel"] == P("model", None, None)
    assert found["gate/kernel"] == found["up/kernel"] == P(None, "model") and found["down/kernel"] == P("model", None)
    assert found["embed/embedding"] == P("model", None) and found["head/kernel"] == P(None, "model")


def test_training_runs_on_the_mesh() -> None:
    """Loss and gradients without a cache equal those of one device."""
    config, mesh = dataclasses.replace(CONFIG, num_layers=1), make_mesh(2, 4)

    def loss(params, tokens):
        logits, _ = Transformer(config).apply({"params": params}, tokens)
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], axis=-1)
        return -picked.mean()

    grad = jax.jit(jax.value_and_grad(loss), compiler_options=FAST_COMPILE)
    want = grad(params_of(config), TOKENS)
    params = place(params_of(config), param_specs(params_of(config), mesh), mesh)
    got = grad(params, place(TOKENS, P("data"), mesh))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
