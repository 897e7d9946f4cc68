"""Inside `jax.shard_map` over rows and kv heads a cache computes what it computes whole, without exchange (law 8)."""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from kvjax.cache.layer_cache import LayerCache
from kvjax.cache.methods import parse
from kvjax.typing import PyTree
from tests.cache.calibrated import data_of
from tests.cache.cases import METHODS
from tests.cache.driver import QUICK, Inputs, Setup, dims_of, draw, prefill, step_of
from tests.thin import thinned

COLLECTIVES = re.compile(r"\b(all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute|collective-broadcast)")
NAMES = (
    "full",
    "random:tokens=24",
    "streaming_llm:tokens=24,positions=renumbered",
    "h2o:tokens=24+int4",
    "snapkv:tokens=48,window=8+kivi-2:group=16",
    "streaming-prefill-h2o",
    "streaming-prefill-random",
    "every-16-blocks",
    "mikv:tokens=24",
    "keydiff:tokens=24",
    "int8_channel",
    "selector-top-pages",
    "selector-probed-pages",
    "selector-top-values",
    "kivi_released:residual=16,group=8",
    "kvquant-2:span=head",
)
SLOW = ("random:tokens=24", "streaming-prefill-random", "keydiff:tokens=24", "kvquant-2:span=head")
HEADS = P("data", None, "model")
LATER = P(None, "data", None, "model")
quick = functools.partial(jax.jit, compiler_options=QUICK)


@functools.cache
def inputs() -> Inputs:
    return draw(21, (64, 17, 40, 2), padded=64, decoded=8, query_heads=8, kv_heads=4)


def specs_of(cache: LayerCache) -> PyTree:
    """Rows over `data`, heads over `model`; positions that all heads share are on every shard of `model`."""
    heads = cache.head_index.shape[0]

    def spec(leaf: jax.Array) -> P:
        rows = "data" if leaf.shape[0] > 1 else None  # what was learnt serves all rows
        return P(rows, "model") if leaf.ndim > 1 and leaf.shape[1] == heads else P(rows)

    return dataclasses.replace(jax.tree.map(spec, cache), head_index=P("model"))


def advance(setup: Setup, cache: LayerCache, prompt: tuple, later: tuple, lengths: jax.Array) -> tuple:
    """Prompt and decoded tokens; `cache`, arrays and lengths are whole or one shard of them."""
    prompt_output, cache = prefill(setup, cache, prompt, lengths)

    def decode(cache: LayerCache, arrays: tuple) -> tuple[LayerCache, jax.Array]:
        valid = jnp.ones_like(cache.length, bool)[:, None]
        output, cache = cache.step(step_of(setup, arrays, cache.length, valid))
        return cache, output

    cache, outputs = jax.lax.scan(decode, cache, later)
    return (prompt_output, outputs), cache


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
@pytest.mark.parametrize("name", thinned([pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in NAMES]))
def test_shards_compute_what_the_whole_does_and_exchange_nothing(name: str) -> None:
    setup = Setup(METHODS[name], dims_of(inputs()), chunk=16)
    later, lengths = inputs().later(), np.array(inputs().lengths, np.int32)
    cache = LayerCache.init(setup.method, setup.dims, lengths, data_of(setup.method, setup.dims))
    whole, whole_cache = quick(functools.partial(advance, setup))(cache, inputs().prompt(), later, lengths)

    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    end = jax.eval_shape(functools.partial(advance, setup), cache, inputs().prompt(), later, lengths)[1]
    sharded = quick(
        jax.shard_map(
            functools.partial(advance, setup),
            mesh=mesh,
            in_specs=(specs_of(cache), HEADS, LATER, P("data")),
            out_specs=((HEADS, LATER), specs_of(end)),
        )
    )
    compiled = sharded.lower(cache, inputs().prompt(), later, lengths).compile()
    assert not COLLECTIVES.findall(compiled.as_text())

    outputs, sharded_cache = compiled(cache, inputs().prompt(), later, lengths)
    exists = np.arange(64) < lengths[:, None]
    np.testing.assert_allclose(np.asarray(outputs[0])[exists], np.asarray(whole[0])[exists], atol=1e-6, rtol=0)
    np.testing.assert_allclose(outputs[1], whole[1], atol=1e-6, rtol=0)
    for ours, theirs in zip(sharded_cache.segments, whole_cache.segments, strict=True):
        np.testing.assert_array_equal(ours.positions, theirs.positions)
    np.testing.assert_array_equal(sharded_cache.length, whole_cache.length)


def test_the_collective_counter_sees_collectives() -> None:
    """The pattern above is not blind: a mean over a sharded axis is found."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    mean = jax.shard_map(lambda x: jax.lax.pmean(x, "data"), mesh=mesh, in_specs=P("data"), out_specs=P())
    assert COLLECTIVES.findall(jax.jit(mean).lower(np.ones(8, np.float32)).compile().as_text())


def test_random_draws_differ_between_heads_and_layers() -> None:
    setup = Setup(parse("random:tokens=24"), dims_of(inputs()))
    held = {}
    for layer in (0, 1):
        dims = dataclasses.replace(setup.dims, layer=layer)
        cache = LayerCache.init(setup.method, dims, np.array(inputs().lengths, np.int32))
        _, cache = quick(functools.partial(prefill, Setup(setup.method, dims)))(
            cache, inputs().prompt(), np.array(inputs().lengths, np.int32)
        )
        held |= {(layer, head): tuple(np.sort(cache.body.positions[0, head])) for head in range(4)}
    assert len(set(held.values())) == 8
