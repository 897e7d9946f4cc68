"""Every head on every seed's stream."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from experiments.continual.encoders import STYLES, Encoder
from experiments.continual.heads import Contender, Hidden, KeySettings, Linear, bottleneck, find_keys
from experiments.continual.stream import Features, Outcome, Stream, choose, class_means, learn_jointly, learn_stream
from kvjax.models.bottleneck import BottleneckConfig
from kvjax.progress import Advance
from kvjax.tasks.images import image_batch

if TYPE_CHECKING:
    from experiments.bottleneck import Config

CHOOSING = 1_000
"""Seed of the stream that learning rates are chosen on; no other number depends on it."""
TRAIN, TEST, OTHERS = range(3)
RATES = (0.00003, 0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
MEANS = "nearest class mean"


@dataclasses.dataclass(frozen=True)
class Results:
    """Of each head: what came of every seed, and the rates that were chosen for the stream and for joint training."""

    outcomes: dict[str, list[Outcome]]
    rates: dict[str, tuple[float, float]]


def measured(config: Config, classes: tuple[int, ...], encoder: Encoder, advance: Advance) -> Results:
    """Chooses rates on a stream of its own, then measures seed by seed; classes: labels of the stream."""
    outcomes: dict[str, list[Outcome]] = {MEANS: []}
    stream = draw(config, classes, encoder, CHOOSING)
    rates = {c.name: choose(c, stream, CHOOSING) for c in contenders(config, encoder, stream, CHOOSING)}
    advance(1, "rates")
    for seed in range(config.size.seeds):
        stream = draw(config, classes, encoder, seed)
        for contender in contenders(config, encoder, stream, seed):
            slow, joint = rates[contender.name]
            found = Outcome(learn_stream(contender, stream, seed, slow), learn_jointly(contender, stream, seed, joint))
            outcomes.setdefault(contender.name, []).append(found)
        outcomes[MEANS].append(class_means(stream))
        advance(1, f"seed {seed}")
    return Results(outcomes, rates)


def draw(config: Config, classes: tuple[int, ...], encoder: Encoder, seed: int) -> Stream:
    """The images of a seed, encoded, and its order of classes; label i is the i-th that comes."""
    order = np.random.default_rng(seed).permutation(classes)

    def images(use: int, count: int) -> tuple[Features, np.ndarray]:
        drawn = [image_batch([seed, use, int(label)], count, (int(label),), STYLES[config.style])[0] for label in order]
        return encoder(np.concatenate(drawn)), np.repeat(np.arange(len(order), dtype=np.int32), count)

    labels = range(len(order))
    tasks = tuple(tuple(labels[start : start + config.per_task]) for start in labels[:: config.per_task])
    size = config.size
    return Stream(images(TRAIN, size.train), images(TEST, size.test), tasks, config.batch, size.passes)


def contenders(config: Config, encoder: Encoder, stream: Stream, seed: int) -> list[Contender]:
    """What is compared on one seed's stream."""
    width, classes = stream.train[0].shape[1], stream.classes
    settings = KeySettings(config.codebooks, config.pairs, config.key_dim)
    drawn, _ = image_batch([seed, OTHERS], len(stream.train[0]), config.encoder_classes, STYLES[config.style])
    key = jax.random.key(seed)
    own, foreign = (find_keys(key, jnp.asarray(found), settings) for found in (stream.train[0], encoder(drawn)))
    plain = BottleneckConfig(classes, config.codebooks, config.pairs)
    return [
        Contender("linear probe", Linear(width, classes), RATES),
        Contender("MLP head", Hidden(width, config.hidden, classes), RATES),
        bottleneck("bottleneck", plain, own),
        bottleneck("bottleneck, keys of the encoder's classes", plain, foreign),
        bottleneck("bottleneck, linear decoder", dataclasses.replace(plain, decoder="linear"), own),
    ]
