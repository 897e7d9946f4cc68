"""What holds for every codec, those with parameters too: pieces, what is not finite, empty stores, reading."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax.cache.codec
from kvjax.cache.codec import Codec
from kvjax.cache.layout import CacheDims
from kvjax.typing import Array, PyTree
from tests.cache.cases import CODECS, covered, exported
from tests.cache.driver import QUICK
from tests.cache.parameters import parameters_of
from tests.cache.test_codec_laws import SPECIAL

DIMS = CacheDims(2, 2, 4, 32, 64, 64, "float32")
quickly = functools.partial(jax.jit, compiler_options=QUICK)
ALL = pytest.mark.parametrize("name", CODECS)


def codec_of(name: str) -> Codec:
    return CODECS[name].for_layer(DIMS)


@functools.cache
def stored(name: str) -> Any:
    """x [2, 2, S, 32] -> (store, what it decodes to), with parameters drawn once."""
    codec = codec_of(name)
    params = parameters_of(codec, DIMS)

    @quickly
    def run(x: Array) -> tuple[PyTree, Array]:
        store = codec.encode(x, params)
        return store, jnp.broadcast_to(codec.decode(store, params), x.shape)

    return run


def normal(tokens: int = 48) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(2, 2, tokens, 32)).astype(np.float32)


def test_every_exported_codec_is_covered() -> None:
    assert exported(kvjax.cache.codec, Codec) == covered(CODECS)


@ALL
def test_all_that_is_finite_decodes_to_finite_numbers(name: str) -> None:
    """Zeros, constants, outliers, subnormal and huge numbers, as tokens and as channels."""
    rows = np.stack(list(SPECIAL.values())).astype(np.float32)
    for special in rows:
        x = np.broadcast_to(special, (2, 2, 48, 32))
        assert np.isfinite(stored(name)(x)[1]).all()
    tall = np.resize(rows, (48, 32))
    assert np.isfinite(stored(name)(np.broadcast_to(tall, (2, 2, 48, 32)))[1]).all()


@ALL
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_harms_its_own_block_only(name: str, bad: float) -> None:
    codec, x = codec_of(name), normal()
    clean = np.asarray(stored(name)(x)[1])
    x[1, 0, 20, 5] = bad
    hurt = np.array(stored(name)(x)[1])
    begin = 20 // codec.block * codec.block
    own = (1, slice(None) if codec.joint else 0, slice(begin, begin + codec.block))
    if name != "identity":
        assert np.isfinite(hurt).all()
    hurt[own] = clean[own]
    np.testing.assert_array_equal(hurt, clean)


@ALL
def test_blocks_and_rows_are_stored_as_they_are_alone(name: str) -> None:
    """One block at a time, as it leaves the ring, and one row at a time."""
    codec, x = codec_of(name), normal()
    params = parameters_of(codec, DIMS)
    whole = np.asarray(stored(name)(x)[1])
    size = codec.block

    @quickly
    def alone(x: Array, params: PyTree) -> Array:
        return codec.decode(codec.encode(x, params), params)

    for begin in range(0, 48, 3 * size):
        part = np.broadcast_to(alone(x[:, :, begin : begin + size], params), (2, 2, size, 32))
        np.testing.assert_allclose(part, whole[:, :, begin : begin + size], atol=1e-6)
    row = jax.tree.map(lambda leaf: leaf[1:] if leaf.shape[0] == 2 else leaf, params)
    np.testing.assert_allclose(np.broadcast_to(alone(x[1:], row), (1, 2, 48, 32)), whole[1:], atol=1e-6)


@ALL
def test_codes_are_those_of_float32_whatever_the_dtype(name: str) -> None:
    """A prompt comes in the model's dtype and a ring gives its tokens up in float32: the same codes."""
    codec, x = codec_of(name), jnp.asarray(normal(), jnp.bfloat16)
    params = parameters_of(codec, DIMS)
    narrow, wide = (quickly(codec.encode)(y, params) for y in (x, x.astype(jnp.float32)))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(a.dtype)), narrow, wide)


@ALL
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_empty_store_has_the_layout_of_a_full_one(name: str, dtype: str) -> None:
    codec = codec_of(name)
    dims = CacheDims(2, 2, 4, 32, 64, 64, dtype)
    x = jax.ShapeDtypeStruct((2, 2, 2 * codec.block, 32), dtype)
    full = jax.eval_shape(codec.encode, x, codec.parameter_shapes(dims))
    empty = codec.empty(dims, 2)
    jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype) or pytest.fail(f"{a} {b}"), full, empty)
    bits = 8 * sum(leaf.nbytes for leaf in jax.tree.leaves(empty))
    assert codec.bits_per_element(dims) == bits / np.prod(x.shape)
    assert np.isfinite(codec.decode(empty, parameters_of(codec, dims))).all()


@ALL
def test_reading_is_reading_what_is_decoded(name: str) -> None:
    """Products and sums through the loader, whole and cut, are those with the decoded slots."""
    codec, x, rng = codec_of(name), normal(), np.random.default_rng(1)
    params = parameters_of(codec, DIMS)
    loader = codec.loader(stored(name)(x)[0], params)
    seen = np.asarray(stored(name)(x)[1], np.float64)
    q = rng.normal(size=(2, 2, 3, 32)).astype(np.float32)
    weights = rng.random((2, 2, 3, 48)).astype(np.float32)
    size = np.abs(seen).max()
    np.testing.assert_allclose(quickly(type(loader).dot)(loader, q), q @ seen.swapaxes(-1, -2), atol=2e-5 * size * 6)
    np.testing.assert_allclose(quickly(type(loader).mix)(loader, weights, None), weights @ seen, atol=2e-5 * size * 7)
    assert (loader.count, loader.head_dim) == (48, 32) and codec.block % loader.block == 0
