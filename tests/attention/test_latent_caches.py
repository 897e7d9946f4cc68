"""Every method on latents does what it does on the whole keys that latents stand for; memory; what codes cost."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.attention.rope import RopeConfig
from kvjax.cache.codec import Integer
from kvjax.cache.fate import Compensate, Demote
from kvjax.cache.head_split import AnyLayer, empty_layer
from kvjax.cache.layout import CacheDims
from kvjax.cache.method import CacheMethod
from kvjax.cache.methods import parse
from kvjax.cache.step import Latent, Step
from pallas_kernels.rope import Rope
from tests.cache.driver import QUICK, held

B, N, R, C, H, D = 2, 4, 16, 8, 8, 32
PROMPT, STEPS = 24, 5
LENGTHS = np.array([24, 17])
RNG = np.random.default_rng(0)
DRAWN = {
    "queries": 1.5 * RNG.standard_normal((B, PROMPT + STEPS, N, C)),
    "own": 1.5 * RNG.standard_normal((B, PROMPT + STEPS, N, H)),
    "keys": RNG.standard_normal((B, PROMPT + STEPS, 1, C)),
    "values": RNG.standard_normal((B, PROMPT + STEPS, 1, R)),
    "up_keys": 0.5 * RNG.standard_normal((N, R, H)),
    "up_values": RNG.standard_normal((N, R, H)),
    "output": RNG.standard_normal((N, H, D)),
}
ARRAYS = {name: jnp.asarray(x, jnp.float32) for name, x in DRAWN.items()}
DIMS = CacheDims(B, 1, N, C, PROMPT + STEPS, PROMPT, "float32", width=D, value_dim=R, latent=True)
WHOLE = dataclasses.replace(DIMS, head_dim=R + C, latent=False)


def step_of(dims: CacheDims, at: Any, valid: Any, positions: Any) -> Step:
    """Tokens `at` int32 [B, T] of each row: as latents, or as the keys and the queries that they stand for."""
    rows = jnp.arange(B)[:, None]
    q, own, keys, values = (ARRAYS[name][rows, at] for name in ("queries", "own", "keys", "values"))
    plain = Step(
        queries=q,
        keys=keys,
        values=values,
        positions=positions,
        valid=valid,
        rope=RopeConfig(30.0).table(C, jnp.int32(PROMPT)),
        hidden=jnp.zeros((*at.shape, D)),
        output_projection=ARRAYS["output"],
        scale=(H + C) ** -0.5,
    )
    if dims.latent:
        return dataclasses.replace(plain, latent=Latent(own, ARRAYS["up_keys"], ARRAYS["up_values"]))
    absorbed = jnp.einsum("btnh,nrh->btnr", own, ARRAYS["up_keys"])
    rope = plain.rope
    assert rope is not None
    still = jnp.concatenate([jnp.zeros(R // 2), rope.inv_freq])  # latents are turned by no angle
    queries, keys = joined(absorbed, q), joined(values, keys)
    behind = jnp.einsum("nrh,nhd->nrd", ARRAYS["up_values"], ARRAYS["output"])
    rope = Rope(still, rope.amplitude)
    return dataclasses.replace(plain, queries=queries, keys=keys, rope=rope, output_projection=behind)


def joined(latent: jax.Array, turned: jax.Array) -> jax.Array:
    """[..., R + C]: halves beside halves, as rotary embedding pairs channels."""
    (a, b), (c, d) = (jnp.split(x, 2, axis=-1) for x in (latent, turned))
    return jnp.concatenate([a, c, b, d], axis=-1)


def run(method: CacheMethod, dims: CacheDims) -> tuple[np.ndarray, np.ndarray, AnyLayer]:
    """What heads give, [B, PROMPT + STEPS, N, H] (0 at padding), the positions held at the end, and the last cache."""
    cache = empty_layer(method, dims, jnp.asarray(LENGTHS, jnp.int32))

    def finish(out: jax.Array) -> jax.Array:
        return out if dims.latent else jnp.einsum("btnr,nrh->btnh", out, ARRAYS["up_values"])

    @jax.jit(compiler_options=QUICK)
    def go(cache: AnyLayer) -> tuple[jax.Array, jax.Array, AnyLayer]:
        positions = jnp.broadcast_to(jnp.arange(PROMPT, dtype=jnp.int32), (B, PROMPT))
        valid = positions < LENGTHS[:, None]
        out, cache = cache.step(step_of(dims, positions, valid, positions))
        cache = cache.end_prompt()

        def one(cache: AnyLayer, i: jax.Array) -> tuple[AnyLayer, jax.Array]:
            at = (jnp.asarray(LENGTHS, jnp.int32) + i)[:, None]
            out, cache = cache.step(step_of(dims, at, jnp.ones((B, 1), bool), at))
            return cache, finish(out)[:, 0]

        cache, later = jax.lax.scan(one, cache, jnp.arange(STEPS, dtype=jnp.int32))
        first = jnp.where(valid[..., None, None], finish(out), 0.0)
        return jnp.concatenate([first, later.swapaxes(0, 1)], axis=1), held(cache), cache

    out, positions, cache = go(cache)
    return np.asarray(out), np.sort(np.asarray(positions), axis=-1), cache


METHODS = {
    name: parse(name)
    for name in (
        "streaming_llm:tokens=10,positions=renumbered",
        "h2o:tokens=10",
        "tova:tokens=10",
        "knorm:tokens=10",
        "keydiff:tokens=10",
        "random:tokens=10",
        "rkv:tokens=12",
        "keyformer:tokens=10",
        "snapkv:tokens=12,window=4",
        "expected_attention:tokens=10",
        "criticalkv:tokens=12,window=4",
        "chunkkv:tokens=12,window=4,size=3",
        "lagkv:tokens=12,lag=4",
        "adakv:tokens=12,window=4",
        "kvcrush:tokens=12,window=4",
    )
}
METHODS["compensate"] = dataclasses.replace(parse("h2o:tokens=10"), fate=Compensate())
METHODS["read rotated"] = dataclasses.replace(parse("h2o:tokens=10"), rotate="read")


QUICKLY = ("streaming_llm", "h2o", "keydiff", "snapkv", "criticalkv", "compensate", "read rotated")


@pytest.mark.parametrize(
    "name", [n if n.startswith(QUICKLY) else pytest.param(n, marks=pytest.mark.slow) for n in METHODS]
)
def test_latents_are_cached_like_the_keys_they_stand_for(name: str) -> None:
    latent, whole = (run(METHODS[name], dims) for dims in (DIMS, WHOLE))
    np.testing.assert_array_equal(latent[1], whole[1])
    assert (latent[1] >= 0).sum() < LENGTHS.sum() + B * STEPS, "nothing was evicted: the comparison shows little"
    np.testing.assert_allclose(latent[0], whole[0], rtol=0, atol=2e-5 * np.abs(whole[0]).max())


@pytest.mark.parametrize(
    ("method", "most"),
    [
        ("int8", 0.02),
        pytest.param("fp8", 0.08, marks=pytest.mark.slow),
        ("kivi-4:group=8,residual=8", 0.2),
        pytest.param("int4:group=8", 0.2, marks=pytest.mark.slow),
        ("demote", 0.02),
    ],
)
def test_codes_of_latents_and_keys_have_scales_of_their_own(
    method: str, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys are a hundred times smaller than latents here: with one scale for both they would be lost."""
    monkeypatch.setitem(ARRAYS, "keys", 0.01 * ARRAYS["keys"])
    monkeypatch.setitem(ARRAYS, "queries", 100 * ARRAYS["queries"])
    if method == "demote":
        fate = Demote(Integer(bits=8), Integer(bits=8))
        made = dataclasses.replace(parse("h2o:tokens=10"), fate=fate)
    else:
        made = parse(method)
    exact, coded = (run(one, DIMS)[0] for one in (parse("full"), made))
    error = np.linalg.norm(coded - exact, axis=-1) / np.linalg.norm(exact, axis=-1).max()
    assert 0 < error[:, PROMPT:].max() < most


def test_a_step_copies_no_store() -> None:
    """A long cache: what a decode step needs beside it is a fraction of it, and it is updated in place."""
    slots, rank = 4096, 128
    dims = dataclasses.replace(DIMS, max_length=slots, prompt_length=slots - 96, value_dim=rank)
    cache = jax.eval_shape(lambda: empty_layer(parse("full"), dims, jnp.asarray(LENGTHS)).in_phase("decode"))
    shapes = (B, 1, N, C), (B, 1, 1, C), (B, 1, 1, rank), (B, 1, N, H), (N, rank, H), (N, rank, H)

    def step(cache: AnyLayer, q: Any, k: Any, v: Any, *latent: Any) -> tuple[jax.Array, AnyLayer]:
        at, rope = cache.length[:, None], RopeConfig().table(C, jnp.int32(slots))
        return cache.step(Step(q, k, v, at, at >= 0, rope, latent=Latent(*latent)))

    arrays = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    memory = jax.jit(step, donate_argnums=0).lower(cache, *arrays).compile().memory_analysis()
    assert memory is not None
    stores = 4 * B * slots * (rank + C)
    assert memory.alias_size_in_bytes >= stores
    assert memory.temp_size_in_bytes < stores / 4, (memory.temp_size_in_bytes, stores)
