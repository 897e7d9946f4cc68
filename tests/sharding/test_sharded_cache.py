"""A cache on a mesh computes what it computes on one device, and its devices say no more than its policy (law 8)."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from kvjax.cache.methods import parse
from kvjax.cache.model_cache import ModelCache
from kvjax.cache.save import load, save
from kvjax.errors import UsageError
from kvjax.sharding import (
    Sharded,
    ShardingRules,
    cache_specs,
    make_mesh,
    place,
    shard_cache,
    sharded_step,
    step_specs,
    unshard_cache,
)
from tests.save.driver import (
    FAST_COMPILE,
    LENGTHS,
    PROMPT,
    SPECS,
    assert_same_bits,
    decode_steps,
    decoded,
    dims,
    empty,
    prefilled,
    prompt_step,
    run_steps,
)
from tests.sharding.hlo import collectives
from tests.thin import thinned

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
TOLERANCE = 1e-5


def compiled(function, *args):
    """Compiled with the cache donated."""
    return jax.jit(function, donate_argnums=0).lower(*args).compile(FAST_COMPILE)


def local_bytes(tree) -> int:
    """Bytes of one device's shards."""
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


def on_host(tree):
    """NumPy arrays: cut for the devices without a compiled program."""
    return jax.tree.map(np.asarray, tree)


def place_step(step, mesh, stacked: bool = False):
    specs = step_specs(jax.tree.map(lambda x: x[0], step) if stacked else step, mesh)
    if stacked:
        specs = jax.tree.map(lambda spec: P(None, *spec), specs)
    return place(on_host(step), specs, mesh)


@pytest.mark.parametrize("spec", thinned(SPECS, 4))
def test_every_named_method_on_a_2_by_4_mesh(spec: str) -> None:
    mesh, method = make_mesh(2, 4), parse(spec)
    if method.joint:
        with pytest.raises(UsageError, match="cannot be cut"):
            shard_cache(on_host(empty(spec)), mesh)
        return
    if method.budget.pooled:
        pytest.skip("heads share their places within a shard: the whole layer is another competition")
    cache = shard_cache(on_host(empty(spec)), mesh)[0]
    prompt, later = place_step(prompt_step(), mesh), place_step(decode_steps(), mesh, stacked=True)

    prefill = compiled(lambda cache, step: cache.step(step), cache, prompt)
    exchanges = int(cache.method.policy.scope == "layer")
    assert sum(collectives(prefill).values()) == exchanges + (cache.method.fate.scope == "layer")
    out, cache = prefill(cache, prompt)
    assert out.sharding.spec == P("data", None, "model")

    decode = compiled(run_steps, cache, later)
    assert sum(collectives(decode).values()) == exchanges * (cache.method.every is not None)
    assert decode.memory_analysis().alias_size_in_bytes == local_bytes(cache), "every shard is updated in place"
    outputs, cache = decode(cache, later)

    exists = np.arange(out.shape[1]) < LENGTHS[:, None]
    whole_out, _ = prefilled(spec)
    whole_outputs, whole = decoded(spec)
    np.testing.assert_allclose(np.asarray(out)[exists], np.asarray(whole_out)[exists], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(outputs, whole_outputs, rtol=0, atol=TOLERANCE)
    assert jax.tree.structure(cache.cache) == jax.tree.structure(whole[0])
    for ours, theirs in zip(cache.segments, whole[0].segments, strict=True):
        for shard in ours.positions.addressable_shards:
            np.testing.assert_array_equal(shard.data, np.asarray(theirs.positions)[shard.index])
    specs = jax.tree.leaves(cache_specs(cache.cache, mesh))
    for leaf, spec_ in zip(jax.tree.leaves(cache), specs, strict=True):
        assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, spec_), leaf.ndim)


def test_what_lies_where() -> None:
    mesh = make_mesh(2, 4)
    layer = empty("h2o:tokens=24+int8")[0]
    specs = cache_specs(layer, mesh)
    assert {specs.length, specs.limit} == {P("data")}
    assert specs.head_index == P("model")
    assert specs.body.positions == specs.body.stats == P("data", "model"), "heads hold different tokens"
    assert specs.recent.positions == P("data"), "all heads share these positions"
    assert set(jax.tree.leaves((specs.body.keys, specs.body.values))) == {P("data", "model")}
    model = ModelCache((layer, layer), jnp.asarray(LENGTHS), layer.method)
    assert cache_specs(model, mesh) == ModelCache((specs, specs), P("data"), layer.method)
    sharded = shard_cache(model, mesh)
    assert local_bytes(sharded.layers[0].cache.body.keys) * 8 == sum(x.nbytes for x in jax.tree.leaves(layer.body.keys))
    assert sharded.nbytes == model.nbytes and sharded.planned_bytes == model.layer_bytes
    assert sharded.effective_bytes == 0 and list(sharded.room()) == list(model.room())
    step = step_specs(
        dataclasses.replace(prompt_step(), hidden=jnp.ones((4, 64, 8)), output_projection=jnp.ones((8, 32, 8))), mesh
    )
    assert step.queries == step.keys == step.values == P("data", None, "model")
    assert step.positions == step.valid == step.hidden == P("data")
    assert step.output_projection == P("model") and step.rope.inv_freq == step.rope.amplitude == P()


@pytest.mark.parametrize(
    ("data", "model", "keys"), [(1, 8, P("data", None)), (8, 1, P(None, "model")), (2, 2, P("data", "model"))]
)
def test_what_the_mesh_does_not_divide_is_replicated_and_still_right(data: int, model: int, keys: P) -> None:
    """4 kv heads on 8 devices; 4 rows on 8 devices; and a part of the devices."""
    mesh = make_mesh(data, model)
    cache = shard_cache(on_host(prefilled("full")[1]), mesh)[0]
    assert cache_specs(cache.cache, mesh).body.keys == keys
    assert cache.cache.body.keys.sharding.is_fully_replicated == (data * model == 8)
    step = jax.tree.map(lambda x: x[0], decode_steps())
    decode = compiled(lambda cache, step: cache.step(step), cache, place_step(step, mesh))
    out, _ = decode(cache, place_step(step, mesh))
    assert collectives(decode) == {}
    np.testing.assert_allclose(out, decoded("full")[0][0], rtol=0, atol=TOLERANCE)


def test_a_map_of_heads_in_order_is_cut_and_any_other_is_refused() -> None:
    mesh = make_mesh(2, 4)
    exists = np.arange(PROMPT) < LENGTHS[:, None]
    prefill = jax.jit(sharded_step, static_argnums=(2, 3), compiler_options=FAST_COMPILE)
    in_order = dataclasses.replace(prompt_step(), kv_head_of_query=(0, 0, 1, 1, 2, 2, 3, 3))
    out, _ = prefill(empty("full")[0], in_order, mesh, ShardingRules())
    np.testing.assert_allclose(
        np.asarray(out)[exists], np.asarray(prefilled("full")[0])[exists], rtol=0, atol=TOLERANCE
    )

    crossed = dataclasses.replace(prompt_step(), kv_head_of_query=(3, 0, 0, 1, 1, 2, 2, 3))
    with pytest.raises(UsageError, match=r"kv_head_of_query.*ShardingRules\(heads=None, kv_heads=None\)"):
        sharded_step(empty("full")[0], crossed, mesh)
    out, _ = prefill(empty("full")[0], crossed, mesh, ShardingRules(heads=None, kv_heads=None))
    q = prompt_step().queries[:, :, [1, 2, 3, 4, 5, 6, 0, 7]]
    sorted_out, _ = prefill(empty("full")[0], dataclasses.replace(prompt_step(), queries=q), mesh, ShardingRules())
    want = np.asarray(sorted_out)[:, :, np.argsort([1, 2, 3, 4, 5, 6, 0, 7])]
    np.testing.assert_allclose(np.asarray(out)[exists], want[exists], rtol=0, atol=TOLERANCE)


def test_a_streaming_prefill_ends_on_the_mesh() -> None:
    method = dataclasses.replace(parse("h2o:tokens=24"), prefill="streaming")
    cache = Sharded(ModelCache.init(method, [dims()])[0], make_mesh(2, 4))
    assert cache.end_prompt().cache.phase == "decode" and cache.dims == dims() and cache.method == method


def test_a_sharded_cache_is_saved_unsharded(tmp_path: Path) -> None:
    cache = prefilled("h2o:tokens=24")[1]
    sharded = shard_cache(cache, make_mesh(2, 4))
    with pytest.raises(UsageError, match="unshard_cache"):
        save(sharded, tmp_path / "c")
    save(unshard_cache(sharded), tmp_path / "c")
    assert_same_bits(load(tmp_path / "c")[0], cache)


def test_a_mesh_that_does_not_fit_and_rules_that_contradict() -> None:
    with pytest.raises(UsageError, match=r"data=4 times model=4 does not fit 8 cpu.*XLA_FLAGS"):
        make_mesh(4, 4)
    with pytest.raises(UsageError, match="query heads go where their kv heads are"):
        ShardingRules(heads=None)


def test_the_counter_is_not_blind() -> None:
    mesh = make_mesh(2, 4)
    x = jax.device_put(np.ones((4, 8), np.float32), NamedSharding(mesh, P("data", "model")))
    total = jax.jit(lambda x: (x.sum(), jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P()))))
    counted = collectives(total.lower(x).compile())
    assert counted["all-reduce"] >= 1 and counted["all-gather"] >= 1
