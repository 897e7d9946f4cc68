"""Training and reading of the variants of `experiments.vit_allocation`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.typing import NDArray

from kvjax.attention import AttentionKind, Bidirectional, GroupedQuery, KeyDriven, KeyNorms
from kvjax.attention.moving_norms import Average, Difference, MovingNorms, Weighting
from kvjax.attention.perturbed import Perturbed
from kvjax.cache.prompt import allocated
from kvjax.cache.step import Step
from kvjax.models.vision_config import VisionConfig
from kvjax.models.vit import VisionTransformer
from kvjax.tasks.images import Style, image_batch
from kvjax.training.schedule import LearningRate, optimizer
from kvjax.typing import Array, PyTree

Batches = Sequence[tuple[NDArray[np.float32], NDArray[np.int32]]]
States = tuple[Any, ...] | None

TEST_BATCH = 200
WINDOW = 20
"""Calls between two moves of the norms; the authors have 300, of trainings many times as long."""
STYLE = Style(
    radius=(7.0, 11.0), shift=1.5, turn=0.4, contrast=(0.5, 1.2), tint=0.3, texture=0.25, strokes=1, noise=0.15
)
"""Easier than the default, so that a model of this size learns most of it in minutes."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """How a pooled model goes on.

    Attributes:
      mixer: its attention.
      states: what training starts with, per layer; given the model and a PRNG key.
      readings: by the end of a row's name, what is evaluated, given what training has ended with.
    """

    mixer: AttentionKind = GroupedQuery()
    states: Callable[[VisionConfig, Array], States] = lambda model, key: None
    readings: Mapping[str, Callable[[States], States]] = dataclasses.field(
        default_factory=lambda: {"": lambda states: None}
    )


def _moving(rule: Weighting) -> Variant:
    def start(model: VisionConfig, key: Array) -> States:
        heads, kv_heads = model.num_heads, model.num_kv_heads
        one = MovingNorms.start(rule, heads, kv_heads, inner=Bidirectional(), window=WINDOW, least=0)
        return (one,) * model.num_layers

    def frozen(states: States) -> States:
        return tuple(state.frozen() for state in states or ())

    def released(states: States) -> States:
        return tuple(dataclasses.replace(state, moves="always") for state in states or ())

    return Variant(states=start, readings={"": frozen, ", moving at evaluation": released})


def _perturbed(model: VisionConfig, key: Array) -> States:
    return tuple(Perturbed(one, Bidirectional()) for one in jax.random.split(key, model.num_layers))


VARIANTS: Mapping[str, Variant] = MappingProxyType(
    {
        "gqa": Variant(),
        "kdgqa": Variant(KeyDriven()),
        "kdgqa, released": Variant(KeyDriven(KeyNorms(per="batch", least=0))),
        "dgqa-diff": _moving(Difference()),
        "dgqa-ema": _moving(Average()),
        "pgqa": Variant(
            states=_perturbed, readings={"": lambda states: None, ", noise at evaluation": lambda states: states}
        ),
    }
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Watched:
    """`Bidirectional` attention that leaves behind the map by which it read, int32 [B, N], or None."""

    head_map: Array | None = None

    def step(self, step: Step) -> tuple[Array, Watched]:
        """As `LayerCacheProtocol.step`."""
        step = allocated(step)
        return Bidirectional().step(step)[0], Watched(step.head_map)


def batches(seed: Sequence[int], count: int, size: int) -> Batches:
    """`count` batches of `size` images."""
    return [image_batch([*seed, i], size, style=STYLE) for i in range(count)]


def _classified(model: VisionConfig, params: PyTree, images: Array, states: States) -> tuple[Array, Any]:
    return VisionTransformer(model).apply({"params": params}, images, states)  # pyright: ignore[reportReturnType]


@functools.lru_cache(maxsize=16)
def _step(model: VisionConfig, rate: float, steps: int) -> tuple[optax.GradientTransformation, Callable[..., Any]]:
    """The optimizer and its compiled step, one for all seeds."""
    tx = optimizer(LearningRate(rate, max(1, steps // 12), steps // 4, steps))

    @jax.jit
    def step(params: PyTree, opt_state: PyTree, states: States, images: Array, labels: Array) -> tuple[Any, ...]:
        def loss(params: PyTree) -> tuple[Array, States]:
            logits, after = _classified(model, params, images, states)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), after

        grads, after = jax.grad(loss, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, after

    return tx, step


def train(model: VisionConfig, params: PyTree, states: States, data: Batches, rate: float) -> tuple[PyTree, States]:
    """One pass over `data`; returns the parameters and the states after it."""
    tx, step = _step(model, rate, len(data))
    opt_state = tx.init(params)
    for images, labels in data:
        params, opt_state, states = step(params, opt_state, states, images, labels)
    return params, states


@functools.lru_cache(maxsize=32)
def _reading(model: VisionConfig) -> Callable[..., Any]:
    @jax.jit
    def read(params: PyTree, states: States, images: Array, labels: Array) -> tuple[Array, States]:
        logits, after = _classified(model, params, images, states)
        return jnp.sum(jnp.argmax(logits, -1) == labels), after

    return read


def evaluate(model: VisionConfig, params: PyTree, states: States, data: Batches) -> tuple[int, float | None]:
    """How many images are told right, and the share of query heads that read another kv head than in equal groups.

    The latter is a mean over layers and images, or None where heads cannot move.
    """
    if states is None and not model.mixer.sees_both_ways:
        states = (Watched(),) * model.num_layers
    read, correct, shares = _reading(model), 0, []
    equal = np.arange(model.num_heads) * model.num_kv_heads // model.num_heads
    for images, labels in data:
        right, states = read(params, states, images, labels)
        correct += int(right)
        maps = [getattr(state, "head_map", None) for state in states or ()]
        shares += [float(np.mean(np.asarray(one) != equal)) for one in maps if one is not None]
    return correct, float(np.mean(shares)) if shares else None
