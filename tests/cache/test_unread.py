"""Tokens that a method sees while it compresses and that are fed afterwards."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.cache.layer_cache import LayerCache
from kvjax.cache.methods import parse
from kvjax.cache.prompt import attend_prompt
from tests.cache.driver import Inputs, Setup, dims_of, draw, step_of


def absorbed(inputs: Inputs, name: str, unread: int) -> LayerCache:
    setup = Setup(parse(name), dims_of(inputs))
    valid = jnp.arange(64) < jnp.asarray(inputs.lengths)[:, None]

    @jax.jit
    def fill(q: jax.Array, k: jax.Array, v: jax.Array) -> LayerCache:
        lengths = jnp.asarray(inputs.lengths, jnp.int32)
        cache = LayerCache.init(setup.method, setup.dims, lengths)
        step = step_of(setup, (q, k, v), cache.length, valid)
        return cache.absorb_prompt(step, attend_prompt(step)[1], unread)

    return fill(*(getattr(inputs, x)[:, :64] for x in "qkv"))


@pytest.mark.parametrize("name", ["full", "snapkv:tokens=24,window=8", "kivi-2:residual=32"])
def test_unread_tokens_are_not_held(name: str) -> None:
    inputs = draw(3, (64, 45, 17), padded=64, decoded=4, query_heads=8)
    cache = absorbed(inputs, name, unread=1)
    assert cache.length.tolist() == [63, 44, 16]
    for segment in cache.segments:
        assert (np.asarray(segment.positions).max(axis=(1, 2)) < np.array([63, 44, 16])).all()


def test_unread_tokens_are_seen() -> None:
    """SnapKV chooses by the last queries: another last query, another choice, though it is not stored."""
    inputs = draw(4, (64,), padded=64, decoded=4, query_heads=8)
    inputs.q[:, 63] *= 40.0
    turned = draw(4, (64,), padded=64, decoded=4, query_heads=8)
    turned.q[:, 63] *= -40.0
    a, b = (absorbed(x, "snapkv:tokens=24,window=8", unread=1).body for x in (inputs, turned))
    assert a is not None and b is not None
    assert (np.asarray(a.positions) != np.asarray(b.positions)).any()
