"""Frozen encoders of the class-incremental study, made from images of classes that are not in its stream."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.typing import NDArray

from experiments.continual import patches
from kvjax.models.bottleneck import loss
from kvjax.models.vit import VisionConfig, VisionTransformer
from kvjax.progress import track
from kvjax.tasks.images import SIZE, STYLE, Style, image_batch
from kvjax.typing import Array, PyTree

if TYPE_CHECKING:
    from experiments.bottleneck import Config

Floats = NDArray[np.float32]

SEED = 77_000
"""First number of the seeds of the encoders' images; no seed of a stream begins with it."""
STYLES = {
    "default": STYLE,
    "clean": Style(radius=(8.0, 12.0), shift=3.0, stretch=0.1, contrast=(0.8, 1.2), texture=0.1, strokes=0, noise=0.05),
}
WIDTH, LAYERS, PATCH = 64, 2, 8
BATCH, DRAWN, RATE, TESTED = 64, 4096, 2e-3, 512
RELATIVE_TO = 1024
"""Images whose features say what is usual."""


@dataclasses.dataclass(frozen=True, eq=False)
class Encoder:
    """Images f32 [n, 32, 32, 3] to features f32 [n, E], which nothing in the study changes.

    Attributes:
      raw: the features themselves.
      mean, spread: f32 [E], of features of the encoder's own classes; features are given relative to them.
      note: what it is, in a sentence.
    """

    raw: Callable[[Floats], Floats]
    mean: Floats
    spread: Floats
    note: str

    def __call__(self, images: Floats) -> Floats:
        return (self.raw(images) - self.mean) / self.spread


def made(config: Config) -> Encoder:
    """The encoder that a run asks for."""
    style = STYLES[config.style]
    raw, note = _MAKERS[config.encoder](config, style)
    found = raw(image_batch([SEED, 1], min(RELATIVE_TO, config.size.train * 10), config.encoder_classes, style)[0])
    return Encoder(raw, found.mean(0), found.std(0) + 1e-6, note)


def patch_statistics(config: Config, style: Style) -> tuple[Callable[[Floats], Floats], str]:
    """See `experiments.continual.patches`."""
    size = config.size
    drawn, _ = image_batch([SEED, 0], size.patch_images, config.encoder_classes, style)
    dictionary = patches.learn_dictionary(drawn, size.patch_entries, SEED)
    note = (
        f"Encoder: responses of {size.patch_entries} patches of {patches.PATCH} x {patches.PATCH} pixels (mean and "
        f"maximum over the image), learnt by k-means from {size.patch_images} images of "
        f"{len(config.encoder_classes)} other classes without labels."
    )
    return lambda images: patches.statistics(images, dictionary), note


def vision_transformer(config: Config, style: Style) -> tuple[Callable[[Floats], Floats], str]:
    """What a vision transformer gives to its classifier, once it has learnt to tell the encoder's classes apart."""
    vit = VisionConfig(
        image_size=SIZE,
        patch_size=PATCH,
        num_classes=len(config.encoder_classes),
        embed_dim=WIDTH,
        num_layers=LAYERS,
        num_heads=4,
        num_kv_heads=4,
        head_dim=WIDTH // 4,
        mlp_dim=2 * WIDTH,
    )
    params = _trained(VisionTransformer(vit), config, style)
    images, labels = _batch(config, style, TESTED, 2)
    right = _logits(VisionTransformer(vit), params, images).argmax(-1) == labels
    note = (
        f"Encoder: a vision transformer ({LAYERS} layers, width {WIDTH}, patches of {PATCH} x {PATCH} pixels), trained "
        f"with labels on {vit.num_classes} other classes, of which it gets {100 * right.mean():.0f} % of new images "
        "right; features are what its classifier reads."
    )
    reader = VisionTransformer(dataclasses.replace(vit, num_classes=WIDTH))
    params = {**params, "head": {"kernel": jnp.eye(WIDTH), "bias": jnp.zeros(WIDTH)}}
    return lambda images: _logits(reader, params, images), note


def _trained(model: VisionTransformer, config: Config, style: Style) -> PyTree:
    """Parameters after AdamW with warm-up and cosine; the images are new ones every `DRAWN`."""
    steps = config.size.encoder_steps
    warmup = min(50, steps // 2)
    rate = optax.warmup_cosine_decay_schedule(0.0, RATE, warmup, steps)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=0.02))

    @jax.jit
    def step(params: PyTree, state: Any, images: Array, labels: Array) -> tuple[PyTree, Any, Array]:
        def of(params: PyTree) -> Array:
            return loss(model.apply({"params": params}, images)[0], labels)  # pyright: ignore[reportIndexIssue, reportArgumentType]

        value, gradient = jax.value_and_grad(of)(params)
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    params = jax.jit(model.init)(jax.random.key(SEED), jnp.zeros((1, SIZE, SIZE, 3)))["params"]
    state, per_draw = tx.init(params), DRAWN // BATCH
    images, labels = _batch(config, style, DRAWN, 3)
    with track("encoder", steps) as advance:
        for at in range(steps):
            if at and at % per_draw == 0:
                images, labels = _batch(config, style, DRAWN, 3 + at // per_draw)
            rows = slice(at % per_draw * BATCH, (at % per_draw + 1) * BATCH)
            params, state, value = step(params, state, jnp.asarray(images[rows]), jnp.asarray(labels[rows]))
            advance(1, f"loss {float(value):.2f}")
    return params


def _batch(config: Config, style: Style, count: int, use: int) -> tuple[Floats, NDArray[np.int64]]:
    """Images of the encoder's classes, and their labels counted from 0."""
    images, labels = image_batch([SEED, use], count, config.encoder_classes, style)
    order = np.argsort(config.encoder_classes)
    return images, order[np.searchsorted(np.asarray(config.encoder_classes)[order], labels)]


def _logits(model: VisionTransformer, params: PyTree, images: Floats) -> Floats:
    """[n, num_classes], a few images at a time."""
    parts = [images[start : start + 4 * BATCH] for start in range(0, len(images), 4 * BATCH)]
    return np.concatenate([np.asarray(_apply(model, params, jnp.asarray(part))) for part in parts])


@jax.jit(static_argnames=("model",))
def _apply(model: VisionTransformer, params: PyTree, images: Array) -> Array:
    return model.apply({"params": params}, images)[0]  # pyright: ignore[reportIndexIssue, reportReturnType]


_MAKERS = {"vit": vision_transformer, "patches": patch_statistics}
