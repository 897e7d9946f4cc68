"""Every stored format holds what its description says, and is read the same in pieces, in place and by attention."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import decode_attention, loader
from pallas_kernels.decode_attention import xla
from pallas_kernels.loader import ConcatLoader, DenseLoader, Float8Loader, Loader, LowRankLoader, ScaledLoader
from pallas_kernels.packing import join_planes, pack, split, unpack
from pallas_kernels.rows import fold
from pallas_kernels.testing import TOLERANCE, assert_close
from tests.oracles.attention import attend_one
from tests.oracles.stored_formats import FORMATS, Size, Stored, codebook, dense, float8, integer, low_rank, outlier
from tests.thin import thinned

NAMES = pytest.mark.parametrize("name", FORMATS)


def size(seed: int = 0, **more: Any) -> Size:
    return Size(np.random.default_rng(seed), **more)


@functools.cache
def stored(name: str) -> Stored:
    return FORMATS[name](size())


@functools.cache
def jitted(method: str) -> Any:
    return jax.jit(lambda loader, *args: getattr(loader, method)(*args))


def near(actual: jax.Array, expected: np.ndarray, terms: np.ndarray | float = 0.0) -> None:
    """Within float32 tolerance of the largest magnitude; `terms` bounds what was added up to get there."""
    assert actual.dtype == jnp.float32 and actual.shape == expected.shape
    assert np.abs(np.asarray(actual) - expected).max() <= TOLERANCE["float32"] * max(np.abs(expected).max(), terms)


def poisoned(stored: Loader, valid: np.ndarray) -> Loader:
    """NaN in what invalid slots hold as floating numbers, in float8 too; valid bool [S], the same within blocks."""

    float8 = any(isinstance(part, Float8Loader) for part in walk(stored))

    def leaf(x: jax.Array) -> jax.Array:
        is_float8 = float8 and x.dtype == jnp.uint8
        if not (jnp.issubdtype(x.dtype, jnp.floating) or is_float8):
            return x
        seen = valid.reshape(x.shape[2], -1).any(axis=-1).reshape(-1, *[1] * (x.ndim - 3))
        return jnp.where(seen, x, jnp.asarray(0x7F if is_float8 else np.nan, x.dtype))

    return stored.with_slots(jax.tree.map(leaf, stored.slots))


def walk(whole: Loader) -> list[Loader]:
    inner = [x for x in vars(whole).values() if isinstance(x, Loader)] + list(getattr(whole, "parts", ()))
    return [whole, *(x for part in inner for x in walk(part))]


def test_every_exported_loader_is_covered() -> None:
    """Those without a row here (`BlockLoader`) are read by the laws of the cache's codecs."""
    used = {type(part).__name__ for name in FORMATS for part in walk(stored(name).loader)}
    assert used == set(loader.__all__) - {"Loader", "BlockLoader"}


@NAMES
def test_decodes_to_what_is_stored(name: str) -> None:
    made = stored(name)
    near(jitted("decode")(made.loader), made.x)
    assert (made.loader.count, made.loader.head_dim) == made.x.shape[-2:]
    assert made.loader.count % (made.loader.block * made.loader.granularity) == 0


@pytest.mark.parametrize("name", thinned(FORMATS))
@settings(max_examples=8)
@given(seed=st.integers(0, 2**16), kept=st.floats(0, 1))
def test_reads_without_decoding(name: str, seed: int, kept: float) -> None:
    """Products and sums equal those with the decoded slots, whatever lies in the slots that are not valid."""
    made, rng = stored(name), np.random.default_rng(seed)
    heads, (slots, dim) = 3, made.x.shape[-2:]
    queries = rng.normal(size=(2, heads, 2, dim)).astype(np.float32)
    near(jitted("dot")(made.loader, queries), queries @ made.x.swapaxes(-1, -2), np.abs(made.x).max() * dim**0.5)

    alive = np.repeat(rng.random(slots // 32) < kept, 32)
    valid = alive & (rng.random((2, heads, slots)) < 0.8)
    weights = (rng.random((2, heads, 2, slots)) * valid[:, :, None]).astype(np.float32)
    sums = jitted("mix")(poisoned(made.loader, alive), weights, valid)
    near(sums, weights @ np.where(valid[..., None], made.x, 0), np.abs(made.x).max() * slots**0.5)
    if made.loader.core.reads_in_place:
        near(jitted("mix")(made.loader, weights, None), weights @ made.x, np.abs(made.x).max() * slots**0.5)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 decoded slots of one head at a time."""
    monkeypatch.setattr(xla, "CPU_CHUNK_BYTES", 4 * 64 * 32)


ARRANGED = (
    ("int3-channel", "codebook4"),
    ("codebook4", "low-rank-per-head"),
    ("codebook2-affine-shared", "scaled-e4m3-shared"),
    ("e5m2-scaled-shared", "outlier-block"),
    ("scaled-by-row", "kvquant-values"),
    ("outlier-shared", "low-rank"),
    ("kvquant-keys-rotated", "low-rank-of-scaled"),
    ("low-rank-rotated", "scaled-by-row"),
    ("mla-keys", "e4m3-scaled"),
    ("concat-of-blocks", "concat-of-blocks"),
    ("kvquant-layer-keys", "outlier-joint"),
    ("subset-by-row-shared", "scaled-fixed3"),
    ("subset", "outlier-joint-block"),
    ("codebook1-affine", "fixed8"),
)
"""Formats of keys and values whose slots and leaves belong to heads in all the ways there are."""


@pytest.mark.parametrize(("keys", "values"), thinned(ARRANGED))
@pytest.mark.usefixtures("small_chunks")
def test_attention_in_chunks(keys: str, values: str) -> None:
    """Ragged rows, masks per head, an empty row, a rest after the whole chunks."""
    k, v = (FORMATS[name](size(1, slots=160)) for name in (keys, values))
    rng = np.random.default_rng(2)
    dim = k.x.shape[-1]
    q = rng.normal(size=(2, 3, 4, dim)).astype(np.float32)
    valid = (np.arange(160) < np.array([[[150]], [[70]]])) & (rng.random((2, 3, 160)) < 0.9)
    valid[1, 2] = False

    @jax.jit
    def attention(q: jax.Array, keys: Loader, values: Loader, valid: jax.Array) -> tuple[jax.Array, ...]:
        options: Any = {"scale": dim**-0.5, "softcap": 4.0, "return_logits": True}
        return decode_attention(q, keys, values, valid=valid, implementation="xla", **options)

    expected = np.zeros((2, 3, 4, v.x.shape[-1]))
    all_k, all_v = (np.broadcast_to(x, (2, 3, *x.shape[2:])) for x in (k.x, v.x))
    for b, h, r in np.ndindex(2, 3, 4):
        if (seen := valid[b, h]).any():
            expected[b, h, r] = attend_one(q[b, h, r], all_k[b, h, seen], all_v[b, h, seen], softcap=4.0)[0]
    logits = 4 * np.tanh(q @ all_k.swapaxes(-1, -2) * dim**-0.5 / 4)
    with np.errstate(divide="ignore"):
        total = np.log(np.where(valid[:, :, None], np.exp(logits), 0).sum(axis=-1))

    out, lse, got = attention(q, k.loader, v.loader, valid)
    near(out, expected, np.abs(v.x).max())
    np.testing.assert_allclose(lse, total, atol=1e-4)
    np.testing.assert_allclose(got, np.where(valid[:, :, None], logits, -np.inf), atol=1e-4)


def test_latent_attention_is_absorbed() -> None:
    """MLA as it is defined, keys and values of all heads made from the latents, against the stored latents."""
    rng = np.random.default_rng(3)
    latent, rotary = (rng.normal(size=(2, 1, 40, n)).astype(np.float32) for n in (16, 8))
    up_k, up_v = (rng.normal(size=(4, 16, n)).astype(np.float32) / 4 for n in (12, 10))
    q = rng.normal(size=(2, 4, 1, 20)).astype(np.float32)
    c = DenseLoader(jnp.asarray(latent))
    keys = ConcatLoader((LowRankLoader(c, jnp.asarray(up_k)), DenseLoader(jnp.asarray(rotary))))
    values = LowRankLoader(c, jnp.asarray(up_v))
    assert keys.core.head_dim == 24 and not jax.tree.leaves(keys.core.per_head)
    valid = jnp.ones((2, 1, 40), bool)
    out, _ = decode_attention(jnp.asarray(q), keys, values, valid=valid, scale=20**-0.5, implementation="xla")
    expected = np.zeros((2, 4, 1, 10))
    for b, n in np.ndindex(2, 4):
        k = np.concatenate([latent[b, 0] @ up_k[n], rotary[b, 0]], axis=-1)
        expected[b, n, 0] = attend_one(q[b, n, 0], k, latent[b, 0] @ up_v[n])[0]
    near(out, expected)


@pytest.mark.parametrize(
    "make",
    [integer(3, fold=2), integer(3, block=128, fold=2), codebook(3, affine=True, fold=2), float8("e4m3", fold=2)],
)
@pytest.mark.usefixtures("small_chunks")
def test_folded_rows_hold_the_same_slots(make: Any) -> None:
    made = make(size(4, slots=1024, batch=1, heads=2, kv_heads=2))
    near(jitted("decode")(made.loader), made.x)
    assert made.loader.granularity * made.loader.block > 1
    q = np.random.default_rng(5).normal(size=(1, 2, 3, 32)).astype(np.float32)
    valid = jnp.arange(1024)[None, None] < 900
    out, _ = jax.jit(lambda q, both: decode_attention(q, both, both, valid=valid, scale=32**-0.5))(q, made.loader)
    expected = np.zeros(q.shape)
    for k, r in np.ndindex(2, 3):
        expected[0, k, r] = attend_one(q[0, k, r], made.x[0, k, :900], made.x[0, k, :900])[0]
    near(out, expected, np.abs(made.x).max())
    folded = fold(made.loader, "tpu")
    near(jitted("decode")(folded), made.x)
    assert folded.count % (folded.granularity * folded.block) == 0


LARGE = {
    "int3": integer(3),
    "codebook4": codebook(4),
    "e4m3": float8("e4m3", scaled=True),
    "outlier": outlier(integer(4, block=32)),
    "low-rank": low_rank(dense(ml_dtypes.bfloat16), rank=128),
}


@pytest.mark.parametrize("name", [*LARGE, "rotated"])
def test_no_format_is_decoded_as_a_whole(name: str) -> None:
    """At 4,096 slots the temporaries of attention stay below an eighth of the decoded keys and values in float32."""
    make = FORMATS["low-rank-rotated"] if name == "rotated" else LARGE[name]
    few = make(size(6, batch=1, heads=8, kv_heads=8, slots=128, dim=128)).loader

    def grown(x: jax.Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((2, x.shape[1], x.shape[2] * 32, *x.shape[3:]), x.dtype)

    many = few.with_slots(jax.tree.map(grown, few.slots))
    q = jax.ShapeDtypeStruct((2, 8, 4, 128), jnp.float32)
    valid = jax.ShapeDtypeStruct((2, 1, 4096), bool)

    def attention(q: jax.Array, both: Loader, valid: jax.Array) -> tuple[jax.Array, ...]:
        return decode_attention(q, both, both, valid=valid, scale=0.1, implementation="xla")

    compiled = jax.jit(attention).lower(q, many, valid).compile()
    memory: Any = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < 2 * 4 * 2 * 8 * 4096 * 128 / 8


@pytest.mark.parametrize("bits", [8, 4, 3, 2, 1])
@given(seed=st.integers(0, 2**16))
def test_split_codes_join_again(bits: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, (3, 32)).astype(np.uint8)
    low, high = split(jnp.asarray(codes), bits)
    assert low.nbytes + (0 if high is None else high.nbytes) == 3 * 32 * bits // 8
    np.testing.assert_array_equal(np.concatenate(join_planes(low, high, bits), axis=-1), codes)
    if high is not None:
        np.testing.assert_array_equal(unpack(low, 2) + 4 * unpack(high, 1), codes)


def test_codes_that_fill_no_bytes_are_refused() -> None:
    with pytest.raises(ValueError, match="12 codes of 1 bits do not fill whole bytes; need a multiple of 8"):
        split(jnp.zeros((2, 12), jnp.uint8), 3)
    with pytest.raises(ValueError, match="8, 4, 2, 1 bits; got 3"):
        pack(jnp.zeros((2, 16), jnp.uint8), 3)


def test_offsets_of_channels_move_the_log_sum_too() -> None:
    """q · offset belongs to every logit: only then do partial results over different formats merge."""
    rng = np.random.default_rng(7)
    x, offset = rng.normal(size=(1, 1, 20, 8)).astype(np.float32), rng.normal(size=(1, 8)).astype(np.float32)
    q, valid = jnp.asarray(rng.normal(size=(1, 1, 2, 8)), jnp.float32), jnp.ones((1, 1, 20), bool)
    stored_without = ScaledLoader(DenseLoader(jnp.asarray(x - offset)), jnp.ones((1, 8)), jnp.asarray(offset))
    parts = [
        decode_attention(q, k, k, valid=valid, scale=1.0, implementation="xla")
        for k in (stored_without, DenseLoader(jnp.asarray(x)))
    ]
    assert_close(*parts)
