"""Law 3: every codec keeps every finite vector within its stated bound, and treats each scale group by itself."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import hypothesis.extra.numpy as numpy_strategies
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvjax.cache.codec import Codec, Float8, Identity, Integer
from kvjax.cache.codec.scale import LIMIT
from kvjax.cache.layout import CacheDims
from kvjax.errors import UsageError
from tests.cache.cases import CODECS
from tests.thin import thinned

HEAD_DIM = 32
SHARED: tuple[tuple[Any, int | None], ...] = (("token", None), ("token", 8), ("channel", None), ("channel", 4))
INTEGERS = {
    f"{axis}-{bits}{'-symmetric' * symmetric}-{group}": Integer(bits, axis, group, symmetric)
    for (bits, symmetric), (axis, group) in [
        *itertools.product([(8, False), (4, True)], SHARED),
        *itertools.product([(8, True), (4, False)], SHARED[1:3]),
        *itertools.product([(2, False), (2, True)], SHARED[::3]),
        *itertools.product([(3, False), (3, True)], SHARED[::2]),
    ]
}
FLOATS = {f"{format}-{scale}": Float8(format, scale) for format in ("e4m3", "e5m2") for scale in ("token", "none")}
ROUNDING = (Identity, Integer, Float8)  # formats that state an error for whatever they are given
ALL: dict[str, Codec] = {
    **{name: codec for name, codec in CODECS.items() if isinstance(codec, ROUNDING)},
    **INTEGERS,
    **FLOATS,
}

HUGE = float(np.float32(3e38))
TINY = float(np.finfo(np.float32).smallest_subnormal)
SPECIAL = {
    "zeros": np.zeros(HEAD_DIM),
    "minus zeros": np.full(HEAD_DIM, -0.0),
    "constant": np.full(HEAD_DIM, 3.3),
    "negative constant": np.full(HEAD_DIM, -1e-3),
    "one outlier": np.r_[1e6, np.linspace(-1, 1, HEAD_DIM - 1)],
    "one small among large": np.r_[np.full(HEAD_DIM - 1, 1e4), 1e-4],
    "subnormal": np.linspace(-40, 40, HEAD_DIM) * TINY,
    "one subnormal": np.r_[5e-39, np.zeros(HEAD_DIM - 1)],
    "far from zero": 1000 + np.linspace(0, 1e-2, HEAD_DIM),
    "both ends": np.linspace(-LIMIT, LIMIT, HEAD_DIM),
    "huge": np.where(np.arange(HEAD_DIM) % 2, 3e38, -3e38),
    "largest": np.full(HEAD_DIM, np.finfo(np.float32).max),
    "wide": np.geomspace(1e-30, 1e30, HEAD_DIM),
}


def dims_of(head_dim: int, dtype: str = "bfloat16") -> CacheDims:
    """Of two rows and one head."""
    return CacheDims(2, 1, 1, head_dim, 1, 1, dtype)


@functools.cache
def jitted(codec: Codec) -> Any:
    """x -> (store, what it decodes to, the stated bound of the error), compiled once per codec and shape."""
    stated = getattr(codec, "error_bound", None)

    @jax.jit
    def run(x: jax.Array) -> tuple[Any, jax.Array, jax.Array]:
        store = codec.encode(x)
        return store, codec.decode(store), jnp.zeros(x.shape) if stated is None else stated(store)

    return run


def check(codec: Codec, x: np.ndarray) -> None:
    """x f32 [..., S, H], finite: decodes to finite values within the bound; beyond a codec's limit they saturate."""
    _, decoded, stated = jitted(codec)(x)
    got = np.asarray(decoded, np.float64)
    assert got.shape == x.shape and decoded.dtype == jnp.float32
    assert np.isfinite(got).all()
    allowed = np.asarray(stated, np.float64)
    limit = np.inf if codec == Identity() else getattr(codec, "limit", LIMIT)
    inside = np.clip(x.astype(np.float64), -limit, limit)
    excess = np.abs(got - inside) - allowed
    assert (excess <= 0).all(), (
        f"error {np.abs(got - inside).flat[excess.argmax()]:.3g} beyond {allowed.flat[excess.argmax()]:.3g}"
    )


@pytest.mark.parametrize("name", thinned(ALL))
def test_special_rows_stay_within_the_bound(name: str) -> None:
    """One token of each kind, then each kind as a whole block, along channels and along tokens."""
    codec = ALL[name]
    rows = np.stack(list(SPECIAL.values())).astype(np.float32)
    tiles = np.broadcast_to(rows[:, None], (len(rows), HEAD_DIM, HEAD_DIM))
    check(codec, np.concatenate([tiles, tiles.swapaxes(1, 2)]))


@pytest.mark.parametrize("name", ALL)
@given(
    x=numpy_strategies.arrays(
        np.float32, (2, 32, HEAD_DIM), elements=st.floats(-HUGE, HUGE, width=32), fill=st.floats(-8, 8, width=32)
    )
)
def test_any_finite_vector_stays_within_the_bound(name: str, x: np.ndarray) -> None:
    check(ALL[name], x)


@pytest.mark.parametrize("name", INTEGERS)
def test_the_bound_is_half_a_step_and_no_more(name: str) -> None:
    """The stated bound would fail if it were a tenth smaller, and the step is what that many levels need."""
    codec = INTEGERS[name]
    x = np.random.default_rng(0).normal(size=(4, 64, HEAD_DIM)).astype(np.float32)
    store, decoded, allowed = jitted(codec)(x)
    worst = (np.abs(np.asarray(decoded, np.float64) - x) / np.asarray(allowed, np.float64)).max()
    assert 0.9 < worst <= 1
    levels = 2 ** (codec.bits - 1) - 1 if codec.symmetric else 2**codec.bits - 1
    spread = np.abs(x).max() if codec.symmetric else np.ptp(x)
    assert np.asarray(store.scale, np.float64).max() <= 1.03 * spread / levels


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", INTEGERS)
def test_what_is_not_finite_harms_no_other_element(name: str, bad: float) -> None:
    """Not even in its own scale group: the others are within the bound, and all decode to finite values."""
    codec = INTEGERS[name]
    x = np.random.default_rng(1).normal(size=(2, 32, HEAD_DIM)).astype(np.float32)
    clean = np.asarray(jitted(codec)(x)[1])
    hurt = x.copy()
    hurt[0, 5, 7] = bad
    _, decoded, allowed = jitted(codec)(hurt)
    decoded = np.asarray(decoded)
    others = np.ones(x.shape, bool)
    others[0, 5, 7] = False
    assert np.isfinite(decoded).all()
    assert (np.abs(decoded - x) <= allowed)[others].all()
    group = np.zeros(x.shape, bool)
    if codec.axis == "token":
        width = codec.group or HEAD_DIM
        group[0, 5, 7 // width * width : 7 // width * width + width] = True
    else:
        group[0, 5 // codec.block * codec.block : (5 // codec.block + 1) * codec.block, 7] = True
    np.testing.assert_array_equal(decoded[~group], clean[~group])


@pytest.mark.parametrize("name", INTEGERS)
def test_a_group_without_a_finite_element_decodes_to_zero(name: str) -> None:
    x = np.full((1, 32, HEAD_DIM), np.nan, np.float32)
    np.testing.assert_array_equal(np.abs(jitted(INTEGERS[name])(x)[1]), 0)


@pytest.mark.parametrize("name", thinned(ALL))
def test_blocks_are_independent_and_leading_axes_free(name: str) -> None:
    """One block alone, or under vmap, or among others: the same codes."""
    codec = ALL[name]
    x = np.random.default_rng(2).normal(size=(2, 3, 64, HEAD_DIM)).astype(np.float32)
    store, decoded, _ = jitted(codec)(x)

    @jax.jit
    def others(x: jax.Array) -> tuple[Any, ...]:
        mapped = jax.vmap(jax.vmap(codec.encode))(x)
        return mapped, codec.encode(x[1, 2, -codec.block :]), jax.vmap(codec.decode)(mapped)

    mapped, alone, mapped_decoded = others(x)
    jax.tree.map(np.testing.assert_array_equal, mapped, store)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[1, 2, -len(a) :]), alone, store)
    np.testing.assert_array_equal(mapped_decoded, decoded)


@pytest.mark.parametrize("name", ["int2", "int4-symmetric", "channel-8-4"])
def test_codes_do_not_depend_on_the_compiler(name: str) -> None:
    """Without jit each operation is compiled by itself: nothing is fused, divisions stay divisions."""
    x = np.random.default_rng(2).normal(size=(64, HEAD_DIM)).astype(np.float32)
    store, decoded, _ = jitted(ALL[name])(x)
    eager = ALL[name].encode(jnp.asarray(x))
    jax.tree.map(np.testing.assert_array_equal, eager, store)
    np.testing.assert_allclose(ALL[name].decode(eager), decoded, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ALL)
def test_an_empty_store_is_zeros_of_the_layout_of_a_full_one(name: str, dtype: str) -> None:
    codec = ALL[name]
    shape, dims = (2, 1, 2 * codec.block, HEAD_DIM), dims_of(HEAD_DIM, dtype)
    store = jax.eval_shape(codec.encode, jax.ShapeDtypeStruct(shape, dtype))

    @jax.jit
    def nothing() -> tuple[Any, jax.Array]:
        empty = codec.empty(dims, 2)
        return empty, codec.decode(empty)

    empty, decoded = nothing()
    jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype) or pytest.fail(f"{a} {b}"), store, empty)
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(empty))
    assert decoded.shape == shape and (np.asarray(decoded) == 0).all()
    stored_bits = 8 * sum(leaf.nbytes for leaf in jax.tree.leaves(empty))
    assert codec.bits_per_element(dims) == stored_bits / decoded.size


@pytest.mark.parametrize(
    ("codec", "expected"),
    [
        (Identity(), 16),
        (Integer(8), 8 + 32 / 128),
        (Integer(8, symmetric=True), 8 + 16 / 128),
        (Integer(4, "token", 32), 4 + 1),
        (Integer(2, "channel"), 2 + 1),
        (Integer(3, "token", 32), 3 + 1),
        (Float8(), 8 + 16 / 128),
        (Float8("e5m2", "none"), 8),
        (Integer(4, "channel", 64, symmetric=True), 4 + 16 / 64),
    ],
    ids=str,
)
def test_bits_count_the_scales(codec: Codec, expected: float) -> None:
    assert codec.bits_per_element(dims_of(128)) == expected


@pytest.mark.parametrize("name", FLOATS)
def test_float8_is_the_nearest_number(name: str) -> None:
    """Against all numbers of the format, and no worse than the bound says; infinities saturate and NaN becomes 0."""
    codec = FLOATS[name]
    rng = np.random.default_rng(4)
    x = (rng.normal(size=(64, HEAD_DIM)) * np.exp(4 * rng.normal(size=(64, HEAD_DIM)))).astype(np.float32)
    x[0, :3] = np.nan, np.inf, -np.inf
    store, decoded, allowed = jitted(codec)(x)
    kind = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}[codec.format]
    every = np.arange(256, dtype=np.uint8).view(kind).astype(np.float64)
    every = np.sort(every[np.isfinite(every)])
    scale = np.ones((64, 1)) if store.scale is None else np.asarray(store.scale, np.float64)[:, None]
    decoded = np.asarray(decoded, np.float64)
    top = every[-1] * scale
    reach = min(np.abs(x[0, 3:]).max(), codec.limit)
    assert decoded[0, 0] == 0 and decoded[0, 1] == -decoded[0, 2] == top[0, 0]
    assert reach * (1 - 2**-20) <= top[0, 0] <= reach * 1.01 or codec.scale == "none"
    error = np.abs(decoded - np.clip(x, -top, top))[1:]
    nearest = np.abs(np.clip(x, -top, top)[..., None] - every * scale[..., None]).min(axis=-1)[1:]
    assert (error <= nearest * (1 + 1e-5) + 2e-7 * np.abs(x[1:])).all()
    assert 0.9 < (error / np.asarray(allowed, np.float64)[1:]).max() <= 1


@pytest.mark.parametrize("name", [n for n, c in INTEGERS.items() if c.symmetric and c.bits < 8])
@given(seed=st.integers(0, 2**16), spread=st.floats(0, 20))
def test_encoding_again_changes_nothing(name: str, seed: int, spread: float) -> None:
    """Where the largest code is always in use: symmetric codes of 4, 3 and 2 bits."""
    codec = INTEGERS[name]
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=(2, 32, HEAD_DIM)) * np.exp(spread * rng.normal(size=(2, 32, 1)))).astype(np.float32)
    once = jitted(codec)(x)[1]
    np.testing.assert_array_equal(jitted(codec)(once)[1], once)


@pytest.mark.parametrize("name", INTEGERS)
def test_encoding_again_adds_at_most_one_more_bound(name: str) -> None:
    codec = INTEGERS[name]
    x = np.random.default_rng(3).normal(size=(2, 32, HEAD_DIM)).astype(np.float32)
    once = jitted(codec)(x)[1]
    _, twice, allowed = jitted(codec)(once)
    assert (np.abs(np.asarray(twice) - np.asarray(once)) <= allowed).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_identity_keeps_the_dtype_and_the_bits(dtype: str) -> None:
    x = jax.random.normal(jax.random.key(0), (2, 3, HEAD_DIM)).astype(dtype)
    store = Identity().encode(x)
    assert store.dtype == dtype and (store == x).all()
    np.testing.assert_array_equal(Identity().decode(store), x.astype(jnp.float32))


def test_codecs_are_values() -> None:
    for codec in ALL.values():
        assert hash(codec) == hash(type(codec)(**vars(codec))) and codec == type(codec)(**vars(codec))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Integer(5), "8, 4, 3, 2 bits; got bits=5"),
        (lambda: Integer(3).validate(36), "codes of 3 bits .* multiple of 8; head_dim is 36"),
        (lambda: Float8("e4m4"), "unknown format of Float8 'e4m4'. Did you mean 'e4m3'"),  # type: ignore[arg-type]
        (lambda: Float8(scale="tokens"), "unknown scale of Float8 'tokens'. Did you mean 'token'"),  # type: ignore[arg-type]
        (lambda: Integer(axis="tokens"), "unknown axis of Integer 'tokens'. Did you mean 'token'"),  # type: ignore[arg-type]
        (lambda: Integer(group=0), "at least 1 element.*group=0"),
        (lambda: Integer(group=2.5), "group=2.5"),  # type: ignore[arg-type]
        (lambda: Integer(symmetric="maybe"), "'maybe'"),  # type: ignore[arg-type]
        (lambda: Integer(4, group=12).validate(32), r"32 is not divisible by group 12.*Valid groups: 2, 4, 8, 16, 32"),
        (lambda: Integer(2).validate(30), "multiple of 4; head_dim is 30"),
        (lambda: Integer(4, "channel", 16).encode(jnp.zeros((24, 32))), "blocks of 16 tokens; 24 tokens"),
        (lambda: Integer(4, group=12).encode(jnp.zeros((1, 32))), "not divisible by group 12"),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(make: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()
