"""Nested losses against NumPy, and what they have in common with the plain one."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kvjax.errors import UsageError
from kvjax.models.config import TransformerConfig
from kvjax.models.embedding import DrawnEmbedding
from kvjax.models.transformer import Transformer
from kvjax.training.forward import OfTransformer, Redrawn
from kvjax.training.loss import Loss, NextToken
from kvjax.training.matryoshka import Matryoshka, Matryoshka2D
from kvjax.training.step import make_step
from tests.training.test_memory_loss import batch_of

D = 16
CONFIG = TransformerConfig(
    vocab_size=16,
    embed_dim=D,
    num_layers=3,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    mlp_dim=16,
    max_positions=32,
)
SMALL = dataclasses.replace(CONFIG, num_layers=1)
TIED = dataclasses.replace(SMALL, tied_embeddings=True)


@functools.cache
def setup(config: TransformerConfig) -> tuple[OfTransformer, Any]:
    forward = OfTransformer(Transformer(config))
    draws = None if config.embedding is None else jnp.zeros(1, jnp.uint32)
    params = forward.module.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32), draws=draws)["params"]
    return forward, jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape), params)


def value(loss: Loss, config: TransformerConfig = CONFIG, number: int = 0) -> float:
    forward, params = setup(config)
    return float(jax.jit(lambda p: loss(forward, p, batch_of(), number)[0])(params))


def logits(config: TransformerConfig, layer: int, width: int) -> np.ndarray:
    """f64 [B, T - 1, V]: the head's first `width` rows on the first channels of a layer's normed output."""
    forward, params = setup(config)
    state = np.asarray(forward.states(params, batch_of()["tokens"][:, :-1])[layer], np.float64)
    normed = state / np.sqrt(np.mean(state**2, axis=-1, keepdims=True) + config.norm_eps)
    normed = normed * np.asarray(params["final_norm"]["scale"], np.float64)
    head = np.asarray(params["embed"]["embedding"].T if config.tied_embeddings else params["head"]["kernel"])
    return normed[..., :width] @ head.astype(np.float64)[:width]


def log_probabilities(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def weighed(nats: np.ndarray, text_weight: float = 0.5) -> float:
    """Mean over answers and text_weight times that over text; one token at a time."""
    batch, sums, counts = batch_of(), {"answer": 0.0, "text": 0.0}, {"answer": 0, "text": 0}
    for name in sums:
        for b, t in zip(*np.nonzero(np.asarray(batch[name])[:, 1:]), strict=True):
            sums[name] += float(nats[b, t])
            counts[name] += 1
    return sums["answer"] / counts["answer"] + text_weight * sums["text"] / counts["text"]


def cross_entropy(x: np.ndarray) -> float:
    targets = np.asarray(batch_of()["tokens"])[:, 1:]
    return weighed(-np.take_along_axis(log_probabilities(x), targets[..., None], axis=-1)[..., 0])


@pytest.mark.parametrize("config", [SMALL, TIED], ids=["head", "tied"])
def test_nested_widths_equal_the_transcription(config: TransformerConfig) -> None:
    each = [cross_entropy(logits(config, -1, width)) for width in (2, 5, D)]
    assert value(Matryoshka((2, 5, D)), config) == pytest.approx(sum(each), rel=1e-5)
    weights = (0.5, 2.0, 0.25)
    expected = sum(c * one for c, one in zip(weights, each, strict=True))
    assert value(Matryoshka((2, 5, D), weights), config) == pytest.approx(expected, rel=1e-5)
    assert max(each) - min(each) > 0.01


@pytest.mark.parametrize("config", [SMALL, TIED], ids=["head", "tied"])
def test_all_channels_alone_are_the_plain_loss(config: TransformerConfig) -> None:
    """To the last bit, gradients included; so are those of a model that is any other function."""
    forward, params = setup(config)

    def gradient(loss: Loss, forward: Any) -> Any:
        return jax.jit(jax.value_and_grad(lambda p: loss(forward, p, batch_of(), 0), has_aux=True))(params)

    plain = gradient(NextToken(), lambda p, tokens: forward.module.apply({"params": p}, tokens)[0])
    jax.tree.map(np.testing.assert_array_equal, gradient(Matryoshka((D,)), forward), plain)
    jax.tree.map(np.testing.assert_array_equal, gradient(NextToken(), forward), plain)
    assert float(plain[0][0]) == pytest.approx(cross_entropy(logits(config, -1, D)), rel=1e-5)


def test_only_the_channels_of_the_widths_matter() -> None:
    forward, params = setup(SMALL)
    grads = jax.jit(jax.grad(lambda p: Matryoshka((3,))(forward, p, batch_of(), 0)[0]))(params)
    head = np.asarray(grads["head"]["kernel"])
    assert np.abs(head[3:]).max() == 0 < np.abs(head[:3]).min()


@pytest.mark.parametrize("number", [0, 3])
def test_layers_and_widths_equal_the_transcription(number: int) -> None:
    loss = Matryoshka2D((2, 5, D), layer_weight=0.7, agreement=0.3, seed=1)
    layer, last, earlier = (int(x) for x in loss.drawn(CONFIG.num_layers, number))
    assert 0 <= layer < CONFIG.num_layers - 1 and {last, earlier} <= {2, 5, D}
    full, narrow = logits(CONFIG, -1, D), logits(CONFIG, -1, last)
    below, thin = logits(CONFIG, layer, D), logits(CONFIG, layer, earlier)
    p, q = log_probabilities(full), log_probabilities(below)
    expected = cross_entropy(full) + cross_entropy(narrow) + 0.7 * (cross_entropy(below) + cross_entropy(thin))
    expected += 0.3 * weighed((np.exp(p) * (p - q)).sum(-1))
    assert value(loss, number=number) == pytest.approx(expected, rel=1e-5)


def test_every_layer_and_width_gets_its_turn_and_a_step_repeats() -> None:
    loss = Matryoshka2D((2, 5))
    turns = [tuple(int(x) for x in loss.drawn(4, number)) for number in range(60)]
    assert {turn[0] for turn in turns} == {0, 1, 2}
    assert {turn[1:] for turn in turns} == {(a, b) for a in (2, 5) for b in (2, 5)}
    assert turns[:3] == [tuple(int(x) for x in loss.drawn(4, number)) for number in range(3)]
    other = [tuple(int(x) for x in Matryoshka2D((2, 5), seed=1).drawn(4, number)) for number in range(60)]
    assert other != turns


def test_agreement_pulls_the_earlier_layer_only() -> None:
    """Without its other terms the loss does not move the last layer."""
    forward, params = setup(CONFIG)
    agree, none = (Matryoshka2D((D,), layer_weight=0.0, agreement=weight) for weight in (1.0, 0.0))
    grads = [jax.jit(jax.grad(lambda p, one=one: one(forward, p, batch_of(), 0)[0]))(params) for one in (agree, none)]
    apart = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), *grads)
    assert max(jax.tree.leaves(apart["layers_2"])) < 1e-6 < max(jax.tree.leaves(apart["layers_0"]))


def test_a_step_trains_with_any_of_them() -> None:
    drawn = dataclasses.replace(TIED, embedding=DrawnEmbedding())
    tx = optax.adam(1e-2)
    for loss, config in ((Matryoshka((4, D)), SMALL), (Redrawn(NextToken(), seed=1), drawn)):
        forward, params = setup(config)
        params = jax.tree.map(jnp.copy, params)
        step, state = make_step(forward, tx, loss), tx.init(params)
        seen = []
        for number in range(8):
            params, state, metrics = step(params, state, batch_of(), number)
            seen.append(float(metrics.loss))
        assert np.isfinite(seen).all() and min(seen[4:]) < seen[0]
    forward, params = setup(drawn)
    first, again, other = (
        float(Redrawn(NextToken(), seed=1)(forward, params, batch_of(), number)[0]) for number in (0, 0, 1)
    )
    assert first == again != other


def test_what_is_wrong_is_said() -> None:
    with pytest.raises(UsageError, match="ascending"):
        Matryoshka((5, 2))
    with pytest.raises(UsageError, match="ascending"):
        Matryoshka2D(())
    with pytest.raises(UsageError, match="2 weights for 1"):
        Matryoshka((5,), (1.0, 2.0))
    with pytest.raises(UsageError, match="has 16 channels"):
        value(Matryoshka((5, 17)))
    with pytest.raises(UsageError, match="one layer"):
        value(Matryoshka2D((5,)), SMALL)
    with pytest.raises(UsageError, match="OfTransformer"):
        Matryoshka((5,))(lambda params, tokens: tokens, {}, batch_of(), 0)
