"""Learning rate and curriculum: what training does at a step and at a stage. Frozen values, no state."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from kvjax.typing import Array


@dataclasses.dataclass(frozen=True)
class LearningRate:
    """Linear warm-up, then constant, then a cosine down to `floor * peak` from `decay_from` to `steps`."""

    peak: float = 3e-3
    warmup: int = 50
    decay_from: int = 1000
    steps: int = 2000
    floor: float = 0.02

    def __call__(self, step: ArrayLike) -> Array:
        """The rate at a step (int32 scalar, may be traced), f32 scalar."""
        at = jnp.asarray(step, jnp.float32)
        rise = jnp.minimum(1.0, (at + 1) / self.warmup)
        share = jnp.clip((at - self.decay_from) / max(self.steps - self.decay_from, 1), 0.0, 1.0)
        return self.peak * rise * (self.floor + (1 - self.floor) * 0.5 * (1 + jnp.cos(jnp.pi * share)))


def optimizer(rate: LearningRate, weight_decay: float = 0.05, clip: float = 1.0) -> optax.GradientTransformation:
    """AdamW (b2 0.95) behind a clip of the global norm; matrices decay, norm scales do not."""

    def matrices(params: optax.Params) -> optax.Params:
        return jax.tree.map(lambda leaf: leaf.ndim > 1, params)

    return optax.chain(
        optax.clip_by_global_norm(clip),
        optax.adamw(rate, b2=0.95, weight_decay=weight_decay, mask=matrices),
    )


#: Recall scenes beside plain single-token retrieval.
TASKS = ("kv3", "multikey", "multiquery", "multivalue", "vt", "copy")


@dataclasses.dataclass(frozen=True)
class Stage:
    """One level of the curriculum.

    Attributes:
      length: tokens of a training sequence.
      pairs: most records of a retrieval scene.
      repeat: share of sequences that repeat random tokens. They teach copying what followed the last
        time, without which retrieval may stay on its plateau for millions of tokens.
      text: share of sequences of plain text; the rest are recall scenes.
      filler: share of recall scenes with ordinary text between the records.
      tasks: share of recall scenes that are not plain single-token retrieval.
      shorter: share of batches that have an eighth, a quarter or half of `length`, where tasks are learnt faster.
      least: steps that the stage lasts at least, for what the gate does not look at.
      shares: of those other scenes, one per name in `TASKS`.
    """

    length: int
    pairs: int
    repeat: float
    text: float
    filler: float
    tasks: float
    shorter: float = 0.0
    least: int = 0
    shares: tuple[float, ...] = (0.2, 0.15, 0.2, 0.2, 0.15, 0.1)


#: Format and length grow when the stage before is learnt; see the model card for what did not work.
CURRICULUM = (
    Stage(64, 4, 0.8, 0.0, 0.0, 0.0),
    Stage(64, 8, 0.6, 0.0, 0.0, 0.0),
    Stage(64, 12, 0.4, 0.1, 0.3, 0.1),
    Stage(128, 16, 0.3, 0.15, 0.4, 0.3),
    Stage(256, 16, 0.1, 0.15, 0.5, 0.75, 0.7, 400),
    Stage(512, 24, 0.05, 0.2, 0.8, 0.7, 0.6, 100),
    Stage(1024, 24, 0.02, 0.2, 1.0, 0.7, 0.5, 650),
    # What is hardest, several values of one key, is learnt where contexts are short.
    Stage(128, 16, 0.05, 0.1, 0.4, 0.9, 0.5, 150, (0.05, 0.05, 0.1, 0.7, 0.05, 0.05)),
    Stage(1024, 24, 0.02, 0.2, 1.0, 0.7, 0.5, 0, (0.15, 0.15, 0.2, 0.25, 0.15, 0.1)),
)


@dataclasses.dataclass(frozen=True)
class Gate:
    """The curriculum advances when retrieval accuracy over `window` steps of a stage has a mean above `accuracy`."""

    accuracy: float = 0.93
    window: int = 20
