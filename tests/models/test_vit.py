"""The image classifier against a transcription, its mixers and states, and fewer heads by the mean."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.attention import Bidirectional, FFNifiedGrid, GroupedQuery, KeyDriven, KeyNorms
from kvjax.attention.moving_norms import Average, MovingNorms
from kvjax.attention.perturbed import Perturbed
from kvjax.convert.mean_heads import mean_heads
from kvjax.errors import UsageError
from kvjax.models.vision_config import VisionConfig
from kvjax.models.vit import VisionTransformer, patches
from tests.attention.decoding import drawn
from tests.oracles import vit as oracle

CONFIG = VisionConfig(
    image_size=12,
    patch_size=4,
    num_classes=5,
    embed_dim=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    mlp_dim=24,
    qkv_bias=True,
    output_bias=True,
    mlp_bias=True,
)
IMAGES = jnp.asarray(np.random.default_rng(0).standard_normal((3, 12, 12, 3)), jnp.float32)


def params_of(config: VisionConfig) -> Any:
    shapes = jax.eval_shape(VisionTransformer(config).init, jax.random.key(0), IMAGES[:1])["params"]
    return drawn(shapes)


def run(config: VisionConfig, params: Any, images: Any = IMAGES, states: Any = None) -> Any:
    return jax.jit(VisionTransformer(config).apply)({"params": params}, images, states)


@pytest.mark.parametrize("pool", ["mean", "class token"])
def test_logits_equal_the_transcription(pool: Any) -> None:
    config = dataclasses.replace(CONFIG, pool=pool)
    params = params_of(config)
    logits, states = run(config, params)
    assert logits.shape == (3, 5) and logits.dtype == jnp.float32 and states is None
    assert config.tokens == 9 + (pool != "mean") == len(params["positions"])
    exact = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    for image, found in zip(IMAGES, logits, strict=True):
        expected = oracle.classify(exact, np.asarray(image, np.float64), 4, 2, config.norm_eps)
        np.testing.assert_allclose(found, expected, atol=1e-5 * (1 + np.abs(expected).max()))


def test_patches_are_squares_row_by_row() -> None:
    cut = patches(IMAGES, 4)
    assert cut.shape == (3, 9, 48)
    np.testing.assert_array_equal(cut[1, 5].reshape(4, 4, 3), IMAGES[1, 4:8, 8:12])


def test_a_late_patch_changes_what_an_early_one_reads() -> None:
    """The class token stands first, so attention that looked back only would not see the image."""
    config = dataclasses.replace(CONFIG, pool="class token")
    params = params_of(config)
    assert abs(run(config, params)[0] - run(config, params, IMAGES.at[:, 8:, 8:].set(0.0))[0]).max() > 1e-2


def test_bfloat16_images_give_float32_logits() -> None:
    params = params_of(CONFIG)
    low, _ = run(CONFIG, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params), IMAGES.astype(jnp.bfloat16))
    high, _ = run(CONFIG, params)
    assert low.dtype == jnp.float32
    np.testing.assert_allclose(low, high, atol=0.1 * float(jnp.abs(high).max()))


@pytest.mark.parametrize(("pool", "kernel"), [("mean", 3), ("class token", 3)])
def test_a_mixer_without_heads_fits(pool: Any, kernel: int) -> None:
    mixer = FFNifiedGrid(kernel, class_tokens=int(pool != "mean"))
    config = dataclasses.replace(CONFIG, mixer=mixer, pool=pool, qkv_bias=False, output_bias=False)
    params = params_of(config)
    logits, states = run(config, params)
    assert logits.shape == (3, 5) and states is None and bool(jnp.isfinite(logits).all())
    assert abs(logits - run(config, params, IMAGES.at[:, 8:, 8:].set(0.0))[0]).max() > 1e-3
    with pytest.raises(UsageError, match="no keys and values to pool"):
        mean_heads(config, params, 1)


def test_states_go_through_every_layer_and_train() -> None:
    """Norms that move and noise are data beside the parameters, inside one compiled step with its gradient."""
    params = params_of(CONFIG)
    moving = MovingNorms.start(Average(), 4, 2, inner=Bidirectional(), window=2)
    noisy = Perturbed(jax.random.key(1), Bidirectional())

    @jax.jit
    def step(params: Any, states: Any) -> Any:
        def loss(params: Any) -> Any:
            logits, after = VisionTransformer(CONFIG).apply({"params": params}, IMAGES, states)  # pyright: ignore[reportGeneralTypeIssues]
            return jnp.square(logits).mean(), after

        return jax.grad(loss, has_aux=True)(params)

    grads, after = step(params, (moving, noisy))
    assert int(after[0].calls) == 1 and float(after[0].kept.min()) > 0
    assert not (jax.random.key_data(after[1].key) == jax.random.key_data(noisy.key)).all()
    assert all(
        bool(jnp.isfinite(leaf).all()) and float(jnp.abs(leaf).max()) > 0
        for leaf in jax.tree.leaves(grads)
        if leaf.size > 30
    )
    plain, _ = run(CONFIG, params)
    np.testing.assert_allclose(run(CONFIG, params, states=(moving.frozen(),) * 2)[0], plain, atol=1e-5)
    assert abs(run(CONFIG, params, states=(noisy,) * 2)[0] - plain).max() > 1e-2


@pytest.mark.parametrize("per", ["example", "batch"])
def test_an_image_is_the_same_alone_only_where_it_has_an_allocation_of_its_own(per: Any) -> None:
    config = dataclasses.replace(CONFIG, num_heads=16, num_kv_heads=4, mixer=KeyDriven(KeyNorms(per, 0)))
    params = params_of(config)
    images = jnp.concatenate([IMAGES * jnp.array([1.0, 3.0, 0.2])[:, None, None, None], IMAGES[::-1] + 1])
    together, _ = run(config, params, images)
    alone = jnp.concatenate([run(config, params, image[None])[0] for image in images])
    assert (abs(together - alone).max() < 1e-4) == (per == "example")


def test_heads_are_pooled_by_the_mean_with_their_biases() -> None:
    full = dataclasses.replace(CONFIG, num_kv_heads=4)
    params = params_of(full)
    config, fewer = mean_heads(full, params, 2)
    assert config == CONFIG
    assert jax.tree.map(jnp.shape, fewer) == jax.tree.map(jnp.shape, params_of(CONFIG))
    for layer in ("layers_0", "layers_1"):
        for name in ("k", "v"):
            old, new = params[layer]["attention"][name], fewer[layer]["attention"][name]
            for head in range(2):
                for part in ("kernel", "bias"):
                    mean = (np.asarray(old[part][..., 2 * head, :]) + np.asarray(old[part][..., 2 * head + 1, :])) / 2
                    np.testing.assert_allclose(new[part][..., head, :], mean, rtol=1e-6, atol=1e-7)
        assert fewer[layer]["mlp"] is params[layer]["mlp"]


def test_pooling_equal_heads_changes_nothing() -> None:
    params = params_of(CONFIG)
    doubled = jax.tree.map(lambda x: x, params)
    for layer in ("layers_0", "layers_1"):
        attention = doubled[layer]["attention"]
        for name in ("k", "v"):
            attention[name] = {part: jnp.repeat(x, 2, axis=-2) for part, x in attention[name].items()}
    config, fewer = mean_heads(dataclasses.replace(CONFIG, num_kv_heads=4), doubled, 2)
    np.testing.assert_allclose(run(config, fewer)[0], run(CONFIG, params)[0], atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": 5}, "not a multiple of patch_size"),
        ({"num_kv_heads": 3}, "not a multiple of num_kv_heads"),
        ({"pool": "max"}, "unknown pool 'max'"),
        ({"mlp_dim": 0}, "mlp_dim must be at least 1"),
        ({"mixer": KeyDriven(KeyNorms(least=3))}, "not enough for 2 kv heads"),
        ({"mixer": FFNifiedGrid(3)}, "has no"),
    ],
)
def test_configs_that_do_not_fit_are_refused(change: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        dataclasses.replace(CONFIG, **change)


def test_images_and_states_that_do_not_fit_are_refused() -> None:
    params = params_of(CONFIG)
    with pytest.raises(UsageError, match=r"images is float \[B, 12, 12, 3\]"):
        run(CONFIG, params, IMAGES[:, :8])
    with pytest.raises(UsageError, match="1 entries for 2 layers"):
        run(CONFIG, params, states=(Bidirectional(),))
    with pytest.raises(UsageError, match="choose a divisor"):
        mean_heads(CONFIG, params, 3)
    assert CONFIG.mixer == GroupedQuery()
