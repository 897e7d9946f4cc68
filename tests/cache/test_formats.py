"""What is particular to a codec: bits per element, errors that its paper states, absence of bias, refusals."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.cache.budget import Uniform
from kvjax.cache.codec import (
    QJL,
    Balanced,
    ByLayer,
    ChannelSubset,
    Codec,
    Fixed,
    Float8,
    Identity,
    Integer,
    LloydMax,
    LowRank,
    NonUniform,
    PerChannel,
    Polar,
    PolarPairs,
    Rotated,
    Sketched,
)
from kvjax.cache.layout import CacheDims
from kvjax.cache.method import CacheMethod
from kvjax.cache.policy import AttentionMass
from kvjax.errors import UsageError
from kvjax.typing import Array
from tests.cache.driver import QUICK
from tests.cache.parameters import parameters_of

WIDE = CacheDims(4, 8, 32, 128, 64, 64, "bfloat16")
H = 128


@pytest.mark.parametrize(
    ("codec", "expected"),
    [
        (NonUniform(3, "channel"), 3 + 12 * 32 / 1024),
        (NonUniform(3, "token"), 3 + 12 * 32 / 1024 + 32 / 1024),
        (NonUniform(2, "token", 0.0), 2 + 32 / 1024),
        (NonUniform(4, "channel", 0.01, "head"), 4 + 2 * 24 / 128),
        (LowRank(Identity(), 0.25), 4),
        (LowRank(Integer(4, "channel", 32), 0.25, 32), (4 + 1) / 4),
        (LloydMax(3), 3 + 16 / H),
        (Rotated(LloydMax(1)), 1 + 16 / H),
        (Sketched(Rotated(LloydMax(2))), 3 + 32 / H),
        (QJL(2, outliers=0), 2 + 16 / H),
        (QJL(2, outliers=8, outlier_bits=0.5, group=32), 2.5 + 32 / H + 8 * 8 / (32 * H)),
        (Rotated(Polar(4)), 3.875),
        (PolarPairs(4, 4, 128), (8 + 64 / 128) / 2),
        (PolarPairs(4, 4, 128, "circle"), (8 + 32 / 128) / 2),
        (ChannelSubset(share=0.5), 8),
        (ChannelSubset(Integer(4, "token", 32), 0.5), (4 + 1) / 2),
        (PerChannel(Fixed(8)), 8),
        (PerChannel(Float8("e5m2", "none")), 8),
        (Balanced(Integer(2, "token", 64)), 2.5),
        (ByLayer((Integer(8), Integer(2))), 8 + 32 / H),
    ],
    ids=str,
)
def test_bits_count_everything_that_grows(codec: Codec, expected: float) -> None:
    assert codec.for_layer(WIDE).bits_per_element(WIDE) == expected


def test_room_for_outliers_is_what_the_release_finds() -> None:
    """21 at either end of 4096 channels (1 %); a head of 64 channels has 1 at either end."""
    codec = NonUniform(4, "token", 0.01)
    assert [codec.capacity(width) for width in (4096, 1024, 64)] == [42, 12, 2]
    assert NonUniform(4, "token", 0.0).capacity(4096) == 0


def one(codec: Codec, x: np.ndarray, seed: int = 0) -> np.ndarray:
    """x [S, H] as it is read back."""
    dims = CacheDims(1, 1, 1, x.shape[1], 64, 64, "float32")
    params = parameters_of(codec, dims, seed)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def stored(x: Array) -> Array:
        return codec.decode(codec.encode(x, params), params)

    return np.asarray(stored(x[None, None]))[0, 0]


def hard(tokens: int = 200) -> np.ndarray:
    """Vectors with channels of very different sizes, one of them far out."""
    rng = np.random.default_rng(5)
    x = rng.standard_t(3, size=(tokens, H)) * np.exp(rng.normal(size=H)) + 2 * rng.normal(size=H)
    x[:, 7] *= 20
    return x.astype(np.float32)


@pytest.mark.parametrize(("bits", "stated"), [(1, 0.363), (2, 0.1175), (3, 0.03454), (4, 0.009497)])
def test_turboquant_has_the_error_that_it_states_whatever_the_vectors(bits: int, stated: float) -> None:
    """Zandieh et al., 2025, theorem 1: |x - x'|² / |x|² over rotations; without one it is nothing like it."""
    x = hard()

    def error(codec: Codec) -> float:
        return float((np.square(one(codec, x) - x).sum(-1) / np.square(x).sum(-1)).mean())

    mean = np.mean([error(Rotated(LloydMax(bits), seed)) for seed in range(6)])
    assert mean == pytest.approx(stated, rel=0.06)
    assert error(LloydMax(bits)) > 1.4 * mean


def slope(codec: Codec, x: np.ndarray, q: np.ndarray) -> float:
    """Of products with decoded vectors on the true products; 1 without bias."""
    exact = (x * q).sum(-1)
    return float((exact * (one(codec, x) * q).sum(-1)).sum() / (exact**2).sum())


def test_products_with_sketches_have_no_bias() -> None:
    """One bit of least squares shrinks products to 2/π of themselves; a sketch of one bit does not (over seeds)."""
    rng = np.random.default_rng(6)
    x = rng.normal(size=(3000, H)).astype(np.float32)
    q = (x + rng.normal(size=x.shape)).astype(np.float32)
    assert slope(Rotated(LloydMax(1)), x, q) == pytest.approx(2 / np.pi, rel=0.02)
    for make in (
        lambda seed: QJL(bits=1, outliers=0, seed=seed),
        lambda seed: QJL(bits=2, outliers=4, group=8, seed=seed),
        lambda seed: Sketched(Rotated(LloydMax(1), seed), seed),
    ):
        slopes = [slope(make(seed), x[:1000], q[:1000]) for seed in range(4)]
        assert np.mean(slopes) == pytest.approx(1, abs=0.03)


def test_outlying_channels_by_themselves_make_sketches_better() -> None:
    x = np.random.default_rng(7).normal(size=(256, H)).astype(np.float32)
    x[:, [3, 50]] *= 30
    plain, split = (one(QJL(bits=2, outliers=n, group=32), x) for n in (0, 2))
    rest = np.delete(np.arange(H), [3, 50])
    assert np.square(split - x)[:, rest].mean() < 0.1 * np.square(plain - x)[:, rest].mean()


def test_outliers_without_room_are_counted_and_take_the_nearest_code() -> None:
    codec = NonUniform(4, "channel", 0.05, "head")
    dims = CacheDims(1, 1, 1, 64, 64, 64, "float32")
    params = parameters_of(codec, dims)
    scale, offset = params["scale"][0], params["offset"][0]
    x = np.zeros((1, 1, 3, 64), np.float32) + np.asarray(offset)
    far = np.array([5.0, 4, 3, 2, 1.5, 1.2, 1.1])
    x[0, 0, 1, :7] += far * np.asarray(scale[0, :7])
    assert codec.capacity(64) == 4
    assert codec.overflow(jnp.asarray(x), params).tolist() == [[[0, 3, 0]]]
    read = np.asarray(codec.decode(codec.encode(jnp.asarray(x), params), params))[0, 0, 1]
    normal = (read - np.asarray(offset)[0]) / np.asarray(scale)[0]
    np.testing.assert_allclose(normal[:4], far[:4], rtol=2**-8)
    np.testing.assert_allclose(normal[4:7], params["levels"][0, 0, -1], rtol=1e-5)


def test_static_scales_reach_as_far_as_the_prompt_did() -> None:
    """Within half a step inside, the end of the range beyond."""
    codec = PerChannel(Fixed(8))
    dims = CacheDims(1, 1, 1, 32, 64, 64, "float32")
    scale = np.asarray(parameters_of(codec, dims))[0, 0]
    x = np.random.default_rng(9).uniform(-1.5, 1.5, (50, 32)).astype(np.float32) * 127 * scale
    read = one(codec, x)
    inside = np.abs(x) <= 127 * scale
    assert (np.abs(read - x) <= scale * 0.5001)[inside].all() and 0.2 < inside.mean() < 0.8
    np.testing.assert_allclose(np.abs(read)[~inside], np.broadcast_to(127 * scale, x.shape)[~inside], rtol=1e-6)


def test_nothing_is_lost_where_nothing_is_left_out() -> None:
    x = hard(20)
    for codec in (LowRank(share=1.0), ChannelSubset(share=1.0)):
        np.testing.assert_allclose(one(codec, x), x, atol=1e-3)


def test_a_layer_beyond_the_last_is_like_it() -> None:
    codec = ByLayer((Integer(8), Integer(4)))
    here = [codec.for_layer(CacheDims(1, 1, 1, 32, 8, 8, layer=layer)) for layer in range(3)]
    assert here == [Integer(8), Integer(4), Integer(4)]
    assert ByLayer((Integer(4, "channel", 8), Integer(4, "channel", 12))).block == 24


TIGHT = Uniform(tokens_kept=24)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NonUniform(5), "4, 3, 2 bits; got bits=5"),
        (lambda: NonUniform(outliers=0.5), "from 0 to 0.5; got outliers=0.5"),
        (lambda: NonUniform(axis="head"), "unknown axis of NonUniform 'head'"),  # type: ignore[arg-type]
        (lambda: NonUniform(span="all"), "unknown span of NonUniform 'all'"),  # type: ignore[arg-type]
        (lambda: NonUniform(3).validate(36), "codes of 3 bits .* multiple of 8; head_dim is 36"),
        (lambda: NonUniform(3).parameters(WIDE), "has to be calibrated to the model first"),
        (lambda: LloydMax(5), "4, 3, 2, 1 bits; got bits=5"),
        (lambda: Fixed(5), "8, 4, 3, 2 bits; got bits=5"),
        (lambda: PerChannel(Integer(8)), "format without scales"),
        (lambda: PerChannel(Float8("e4m3", "token")), "format without scales"),
        (lambda: Rotated(NonUniform(3)), "the inner codec must need no calibration"),
        (lambda: Balanced(PerChannel(Fixed(8))), "take nothing from the prompt"),
        (lambda: LowRank(share=0.0), "above 0 and up to 1; got share=0.0"),
        (lambda: LowRank(Integer(4, "channel", 32), window=16), "multiple of the inner codec's block of 32"),
        (lambda: ChannelSubset(share=1.5), "got share=1.5"),
        (lambda: QJL(bits=0), "at least 1 bit"),
        (lambda: QJL(outliers=32).validate(32), "cannot sketch 32 outlying channels of 32"),
        (lambda: Sketched(Integer(8)).validate(12), "codes of 1 bits .* multiple of 8; head_dim is 12"),
        (lambda: Polar(0), "1 to 6 levels; got levels=0"),
        (lambda: Polar(4).validate(24), "multiple of 16 channels; head_dim is 24"),
        (lambda: PolarPairs(3), "8, 4, 2, 1 bits; got 3"),
        (lambda: PolarPairs(angles="all"), "unknown angles of PolarPairs 'all'"),  # type: ignore[arg-type]
        (lambda: ByLayer(()), "at least one codec"),
        (lambda: ByLayer((Integer(8),)).encode(jnp.zeros((1, 1, 1, 32))), "ask for_layer first"),
        (lambda: CacheMethod(keys=LowRank(), budget=TIGHT, policy=AttentionMass(), recent=4), "all heads of a token"),
        (lambda: CacheMethod(values=Balanced(Integer(8)), prefill="streaming"), "whole prompt"),
        (lambda: CacheMethod(keys=Balanced(Integer(8)), rotate="read"), "rotated keys"),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(make: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()
