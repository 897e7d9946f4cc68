"""What codecs are fitted with: codebooks by weighted k-means, Q-Norm, first factors of projections."""

from __future__ import annotations

import numpy as np
import pytest

from kvjax.cache.codec import LowRank, NonUniform
from kvjax.cache.codec.kmeans import fit_non_uniform, matched_moments, weighted_kmeans
from kvjax.cache.layout import CacheDims
from kvjax.convert.low_rank import activation_factors, input_factor, singular_factors
from kvjax.errors import UsageError
from tests.oracles import cskv, kvquant, kvquant_fit

RNG = np.random.default_rng


@pytest.mark.parametrize("seed", range(3))
def test_k_means_is_lloyds_iteration_and_close_to_the_best(seed: int) -> None:
    rng = RNG(seed)
    x, weights = rng.standard_t(4, 120), rng.exponential(size=120) ** 2
    fitted = weighted_kmeans(x, weights, 4)
    np.testing.assert_allclose(
        kvquant_fit.weighted_kmeans(x, weights, fitted, iterations=1), fitted, atol=1e-12
    )  # a fixed point
    best = kvquant_fit.best_codebook(x, weights, 4)
    losses = [kvquant_fit.weighted_loss(x, weights, table) for table in (fitted, best)]
    assert losses[0] <= 1.001 * losses[1]


def test_numbers_without_weight_move_no_centroid() -> None:
    x = np.r_[RNG(8).normal(size=50), 100.0]
    weights = np.r_[np.ones(50), 0.0]
    losses = [kvquant_fit.weighted_loss(x, weights, weighted_kmeans(x[:n], weights[:n], 4)) for n in (50, 51)]
    assert losses[1] <= 1.2 * losses[0]
    assert len(weighted_kmeans(np.zeros(5), np.ones(5), 8)) == 8


def test_q_norm() -> None:
    x, table = RNG(0).normal(size=500), np.array([-1.0, -0.2, 0.3, 1.1])
    expected = kvquant_fit.q_normalised(x, table)
    got = matched_moments(table, x)
    np.testing.assert_allclose(got, expected)
    rounded = got[np.abs(x[:, None] - table).argmin(axis=1)]
    assert rounded.mean() == pytest.approx(x.mean()) and rounded.std() == pytest.approx(x.std())


@pytest.mark.parametrize("span", ["layer", "head"])
@pytest.mark.parametrize("weighting", ["range", "plain"])
def test_the_fit_of_keys_and_values(span: str, weighting: str) -> None:
    """Thresholds, outliers and weights are the transcription's; the codebook is a fixed point of its iteration."""
    rng = RNG(1)
    x = rng.standard_t(3, size=(60, 2, 16)) * rng.uniform(0.5, 3, (2, 16))
    fisher = rng.exponential(size=x.shape)
    flat, ranged = x.reshape(60, -1), weighting == "range"
    options = {"weighting": weighting, "iterations": 500}
    keys = fit_non_uniform(NonUniform(2, "channel", 0.1, span), x, fisher, **options)  # type: ignore[arg-type]
    low, high = kvquant.key_limits(flat[None], outliers=0.1, exact_first=0)
    zero, reach = kvquant.plain_affine(low, high)
    np.testing.assert_allclose(keys["offset"].reshape(-1), zero, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(keys["scale"].reshape(-1), reach, rtol=1e-5)
    out = kvquant.key_outliers(flat, zero, reach)
    check_fixed_point(keys, (flat - zero) / reach, ~out, fisher.reshape(60, -1), reach, ranged)

    values = fit_non_uniform(NonUniform(2, "token", 0.1, span), x, fisher, **options)  # type: ignore[arg-type]
    vectors = flat if span == "layer" else x.reshape(120, 16)
    out = kvquant.value_outliers(vectors, outliers=0.1)
    zero, reach = (a[:, None] for a in kvquant.plain_affine(*kvquant.value_limits(vectors, out)))
    check_fixed_point(values, (vectors - zero) / reach, ~out, fisher.reshape(vectors.shape), reach, ranged)


def check_fixed_point(
    fitted: dict, normal: np.ndarray, kept: np.ndarray, fisher: np.ndarray, reach: np.ndarray, squared: bool
) -> None:
    weights = kvquant_fit.fit_weights(fisher, reach, squared_reach=squared)[kept]
    codebook = fitted["codebook"][0, 0].astype(np.float64)
    again = kvquant_fit.weighted_kmeans(normal[kept], weights, codebook, iterations=1)
    np.testing.assert_allclose(again, codebook, atol=1e-5)
    np.testing.assert_array_equal(fitted["levels"], fitted["codebook"])


def test_fitted_parameters_have_the_shapes_of_the_codec() -> None:
    dims = CacheDims(1, 2, 4, 16, 8, 8)
    x = RNG(2).normal(size=(40, 2, 16))
    for codec in (NonUniform(3, "channel"), NonUniform(3, "token")):
        fitted = fit_non_uniform(codec, x, np.ones_like(x), match_moments=True)
        codec.parameters(dims, fitted)
        assert (fitted["levels"] != fitted["codebook"]).any()
    weights = RNG(3).normal(size=(24, 2, 16))
    low_rank = LowRank(share=0.5)
    low_rank.parameters(dims, singular_factors(weights, low_rank.rank(dims)))


@pytest.mark.parametrize("rank", [4, 24])
def test_factors_are_the_papers_read_from_keys(rank: int) -> None:
    """W E and the decoder are A and B up to signs, so A B is; with all of the rank it is W."""
    weights, inputs = RNG(4).normal(size=(24, 2, 16)), RNG(5).normal(size=(3, 20, 24)) * np.arange(1, 25)
    flat = weights.reshape(24, -1)
    means = np.abs(inputs).mean(axis=(0, 1))
    pairs = [
        (singular_factors(weights, rank), cskv.svd_factors(flat, rank)),
        (
            activation_factors(weights, means, rank),
            cskv.asvd_factors(flat, means + 1e-6, rank, alpha=0.5),
        ),
    ]
    for ours, (down, up) in pairs:
        decoder = ours["decoder"][0].swapaxes(0, 1).reshape(rank, -1)
        np.testing.assert_allclose(input_factor(weights, ours["encoder"]) @ decoder, down @ up, atol=2e-5)
        if rank == 24:
            np.testing.assert_allclose(down @ up, flat, atol=1e-9)


def test_activations_move_the_error_to_channels_that_are_small() -> None:
    weights, scale = RNG(6).normal(size=(32, 2, 16)), np.geomspace(0.01, 10, 32)
    x = RNG(7).normal(size=(500, 32)) * scale
    flat = weights.reshape(32, -1)
    errors = []
    for factors in (singular_factors(weights, 8), activation_factors(weights, np.abs(x).mean(0), 8, alpha=1.0)):
        decoder = factors["decoder"][0].swapaxes(0, 1).reshape(8, -1)
        errors.append(np.square(x @ flat - x @ flat @ factors["encoder"][0, 0] @ decoder).mean())
    assert errors[1] < 0.7 * errors[0]


def test_impossible_factors_are_refused() -> None:
    with pytest.raises(UsageError, match="ranks 1 to 8; got 9"):
        singular_factors(np.ones((8, 2, 16)), 9)
    with pytest.raises(UsageError, match=r"one per input channel, \(8,\); got \(7,\)"):
        activation_factors(np.ones((8, 2, 16)), np.ones(7), 2)
