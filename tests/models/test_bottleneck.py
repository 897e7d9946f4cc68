"""The discrete key-value bottleneck: keys against a slow transcription, values that only move where they are read."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.errors import UsageError
from kvjax.models import codebook
from kvjax.models.bottleneck import Bottleneck, BottleneckConfig, loss, train_values
from kvjax.models.codebook import Averages, Codebooks
from tests.oracles import bottleneck as oracle

B, E, C, J, DIM, CLASSES = 12, 10, 5, 7, 3, 4
CONFIG = BottleneckConfig(CLASSES, C, J)
LINEAR = dataclasses.replace(CONFIG, decoder="linear", value_dim=6)


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def made(n: int = 40) -> tuple[Codebooks, Averages]:
    return codebook.create(jax.random.key(1), jnp.asarray(draw(n, E, seed=1)), C, J, DIM)


def values(*shape: int) -> Any:
    return {"values": jnp.asarray(draw(*shape, seed=2))}


def test_keys_begin_as_different_features() -> None:
    books, averages = made()
    projected = np.asarray(codebook.project(books.projections, jnp.asarray(draw(40, E, seed=1))))
    for c in range(C):
        distances = ((np.asarray(books.keys)[c, :, None] - projected[c]) ** 2).sum(-1)
        assert (distances.min(1) == 0).all() and len(set(distances.argmin(1))) == J
    np.testing.assert_array_equal(averages.counts, 1)
    np.testing.assert_array_equal(averages.sums, books.keys)
    spread = codebook.create(jax.random.key(0), jnp.zeros((1, 200)), 4, 2, 50)[0].projections
    assert float(spread.std()) == pytest.approx(np.sqrt(2 / 250), rel=0.02), "Xavier-normal"


def test_more_keys_than_features_repeat_them_evenly() -> None:
    index = np.asarray(codebook.draw(jax.random.key(0), 3, 7, 3))
    for row in index:
        assert sorted(np.bincount(row, minlength=3)) == [2, 2, 3]
    assert len({tuple(row[:3]) for row in index}) > 1, "each codebook draws for itself"


@pytest.mark.parametrize(("decay", "threshold"), [(0.95, 0.1), (0.5, 0.8), (0.0, 1.0), (0.9, 0.0)])
def test_learning_keys_equals_the_transcription_step_by_step(decay: float, threshold: float) -> None:
    books, averages = made()
    replaced = stayed = 0
    for step in range(6):
        features, key = jnp.asarray(draw(B, E, seed=10 + step)), jax.random.key(step)
        expected = oracle.learn_keys(
            np.asarray(books.projections),
            np.asarray(books.keys),
            np.asarray(averages.counts),
            np.asarray(averages.sums),
            np.asarray(features),
            np.asarray(codebook.draw(key, C, J, B)),
            decay,
            threshold,
        )
        books, averages = codebook.learn(books, averages, features, key, decay, threshold)
        for found, wanted in zip((books.keys, averages.counts, averages.sums), expected, strict=True):
            np.testing.assert_allclose(found, wanted, atol=1e-5 * max(1, abs(wanted).max()))
        at_threshold = np.isclose(expected[1], threshold)
        replaced, stayed = replaced + at_threshold.sum(), stayed + (~at_threshold).sum()
    assert stayed and (replaced > 0) == (threshold > 0.1), "dead keys and others were both seen"


def test_a_dead_key_becomes_a_feature_and_finds_it() -> None:
    books, averages = made()
    far = dataclasses.replace(books, keys=books.keys.at[:, 3].set(1e3))
    features, key = jnp.asarray(draw(B, E, seed=4)), jax.random.key(2)
    dead = Averages(averages.counts.at[:, 3].set(1e-6), averages.sums)
    after, counts = codebook.learn(far, dead, features, key, 0.9, 0.05)
    chosen = np.asarray(codebook.draw(key, C, J, B))[:, 3]
    index = np.asarray(codebook.nearest(after, features))
    np.testing.assert_array_equal(index[chosen, np.arange(C)], 3)
    np.testing.assert_allclose(counts.counts[:, 3], 0.05)


def test_a_key_that_nothing_is_near_stays_exactly_for_ever() -> None:
    """Its averages shrink to nothing together, and their quotient must not become noise."""
    books, averages = made()
    books = dataclasses.replace(books, keys=books.keys.at[:, 3].set(100.0))
    averages = dataclasses.replace(averages, sums=averages.sums.at[:, 3].set(100.0))
    features = jnp.asarray(draw(B, E, seed=4))
    for step in range(40):
        books, averages = codebook.learn(books, averages, features, jax.random.key(step), 0.01, 0.0)
    assert (averages.counts[:, 3] == 0).all(), "the count has underflowed"
    np.testing.assert_array_equal(books.keys[:, 3], 100.0)
    assert np.isfinite(np.asarray(books.keys)).all()


def test_learning_lowers_the_distance_to_the_keys() -> None:
    features = jnp.asarray(draw(64, E, seed=5))

    def distance(books: Codebooks) -> float:
        h = np.asarray(codebook.project(books.projections, features))
        index = np.asarray(codebook.nearest(books, features))
        return float(np.mean((h - np.asarray(books.keys)[np.arange(C)[:, None], index.T]) ** 2))

    books, averages = codebook.create(jax.random.key(1), features, C, J, DIM)
    before = distance(books)
    for step in range(20):
        books, averages = codebook.learn(books, averages, features, jax.random.key(step), 0.8, 0.1)
    assert distance(books) < 0.9 * before


def test_the_nearest_key_is_that_of_the_transcription() -> None:
    books, _ = made()
    features = draw(200, E, seed=3)
    found = codebook.nearest(books, jnp.asarray(features))
    assert found.shape == (200, C) and found.dtype == jnp.int32
    expected = oracle.fetch(features, np.asarray(books.projections), np.asarray(books.keys))
    np.testing.assert_array_equal(found, expected)
    twice = dataclasses.replace(books, keys=jnp.concatenate([books.keys, books.keys], axis=1))
    np.testing.assert_array_equal(codebook.nearest(twice, jnp.asarray(features)), expected)  # the first of equals


def test_features_in_bfloat16_are_compared_in_float32() -> None:
    books, _ = made()
    features = jnp.asarray(draw(50, E, seed=3)).astype(jnp.bfloat16)
    expected = codebook.nearest(books, features.astype(jnp.float32))
    np.testing.assert_array_equal(codebook.nearest(books, features), expected)


def test_the_forward_pass_equals_the_transcription() -> None:
    books, _ = made()
    features, params = draw(B, E, seed=6), values(C, J, CLASSES)
    found = Bottleneck(CONFIG).apply({"params": params}, jnp.asarray(features), books)
    index = oracle.fetch(features, np.asarray(books.projections), np.asarray(books.keys))
    expected = oracle.logits(index, np.asarray(params["values"]))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    labels = np.arange(B) % CLASSES
    nats = -np.log(oracle.probabilities(expected)[np.arange(B), labels]).mean()
    assert float(loss(jnp.asarray(found), jnp.asarray(labels))) == pytest.approx(nats, rel=1e-5)
    params |= {"decoder": {"kernel": jnp.asarray(draw(CLASSES, 9)), "bias": jnp.asarray(draw(9))}}
    config = dataclasses.replace(LINEAR, classes=9, value_dim=CLASSES)
    found = Bottleneck(config).apply({"params": params}, jnp.asarray(features), books)
    expected = expected @ np.asarray(params["decoder"]["kernel"]) + np.asarray(params["decoder"]["bias"])
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_new_values_say_nothing_without_a_decoder_and_something_with_one() -> None:
    books, _ = made()
    for config in (CONFIG, LINEAR):
        params = Bottleneck(config).init(jax.random.key(0), jnp.zeros((1, E)), books)["params"]
        width = CLASSES if config is CONFIG else 6
        assert params["values"].shape == (C, J, width) and set(params) == {"values", "decoder"} - (
            {"decoder"} if config is CONFIG else set()
        )
        assert float(params["values"].std()) == (0 if config is CONFIG else pytest.approx(1, abs=0.2))


@pytest.mark.parametrize("config", [CONFIG, LINEAR], ids=["softmax", "linear"])
def test_only_what_is_fetched_gets_a_gradient(config: BottleneckConfig) -> None:
    books, _ = made()
    features, labels = jnp.asarray(draw(2, E, seed=7)), jnp.asarray([1, 3])
    params = Bottleneck(config).init(jax.random.key(0), features, books)["params"]

    def of(params: Any, features: Any, books: Codebooks) -> Any:
        return loss(jnp.asarray(Bottleneck(config).apply({"params": params}, features, books)), labels)

    gradient, to_features, to_books = jax.grad(of, argnums=(0, 1, 2))(params, features, books)
    rows = np.asarray(gradient["values"])
    fetched = np.zeros((C, J), bool)
    fetched[np.arange(C), np.asarray(codebook.nearest(books, features))] = True
    assert (rows[~fetched] == 0).all() and fetched.sum() <= 2 * C
    assert (abs(rows[fetched]).max(-1) > 0).all()
    assert all((leaf == 0).all() for leaf in jax.tree.leaves((to_features, to_books))), "encoder and keys are frozen"


def test_the_gradient_of_values_is_that_of_the_softmax() -> None:
    """(probabilities - one-hot label) / (B C), summed over the features that fetched the value."""
    books, _ = made()
    features, labels = draw(B, E, seed=8), np.arange(B) % CLASSES
    params = values(C, J, CLASSES)
    index = oracle.fetch(features, np.asarray(books.projections), np.asarray(books.keys))
    apart = oracle.probabilities(oracle.logits(index, np.asarray(params["values"]))) - np.eye(CLASSES)[labels]
    expected = np.zeros((C, J, CLASSES))
    for row, c in np.ndindex(B, C):
        expected[c, index[row, c]] += apart[row] / (B * C)
    after, _ = train_values(CONFIG, params, jnp.asarray(index), jnp.asarray(labels), 1.0)
    np.testing.assert_allclose(params["values"] - after["values"], expected, atol=1e-6)


@pytest.mark.parametrize("config", [CONFIG, LINEAR], ids=["softmax", "linear"])
def test_training_fits_its_task_and_leaves_other_values_alone(config: BottleneckConfig) -> None:
    books, _ = made()
    features, labels = jnp.asarray(draw(B, E, seed=9)), jnp.asarray(np.arange(B) % CLASSES)
    index = codebook.nearest(books, features)
    start = Bottleneck(config).init(jax.random.key(0), features, books)["params"]
    params, losses = start, []
    for _ in range(200):
        params, value = train_values(config, params, index, labels, 0.5 * C)
        losses.append(float(value))
    assert losses[-1] < 0.3 * losses[0]
    fetched = np.zeros((C, J), bool)
    fetched[np.arange(C), np.asarray(index)] = True
    assert not fetched.all()
    np.testing.assert_array_equal(params["values"][~fetched], start["values"][~fetched])


def test_sizes_that_cannot_be_are_refused() -> None:
    with pytest.raises(UsageError, match="at least 1"):
        BottleneckConfig(classes=0)
    with pytest.raises(UsageError, match="unknown decoder 'mlp'; one of softmax, linear"):
        BottleneckConfig(classes=2, decoder="mlp")  # pyright: ignore[reportArgumentType]
    with pytest.raises(UsageError, match=r"features \[n, E\]"):
        codebook.create(jax.random.key(0), jnp.zeros((3, 4, 5)), C, J, DIM)
