"""Heads on frozen features, all trained by plain gradient descent on the same batches."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from kvjax.models.bottleneck import Bottleneck, BottleneckConfig, loss
from kvjax.models.codebook import Codebooks, create, learn, nearest
from kvjax.typing import Array, PyTree


class Head(Protocol):
    """A frozen, hashable value; it compiles once."""

    def init(self, key: Array) -> PyTree:
        """New parameters."""
        ...

    def logits(self, params: PyTree, x: Array) -> Array:
        """x [n, ...], as `Contender.prepare` gives it, to f32 [n, classes]."""
        ...


@dataclasses.dataclass(frozen=True)
class Contender:
    """Attributes:
    name: for tables.
    head: what learns.
    rates: learning rates to choose from.
    prepare: features f32 [n, E] to what the head reads; once, because encoder and keys are frozen.
    """

    name: str
    head: Head
    rates: tuple[float, ...]
    prepare: Callable[[Array], Array] = lambda features: features


@dataclasses.dataclass(frozen=True)
class Linear:
    """One map from E = `width` channels, which starts at zero."""

    width: int
    classes: int

    def init(self, key: Array) -> PyTree:
        del key
        return {"kernel": jnp.zeros((self.width, self.classes)), "bias": jnp.zeros((self.classes,))}

    def logits(self, params: PyTree, x: Array) -> Array:
        return x @ params["kernel"] + params["bias"]


@dataclasses.dataclass(frozen=True)
class Hidden:
    """One hidden layer with ReLU; the last map starts at zero."""

    width: int
    hidden: int
    classes: int

    def init(self, key: Array) -> PyTree:
        first = jax.random.normal(key, (self.width, self.hidden)) * (2 / self.width) ** 0.5
        return {"first": first, "offset": jnp.zeros((self.hidden,)), **Linear(self.hidden, self.classes).init(key)}

    def logits(self, params: PyTree, x: Array) -> Array:
        return Linear(self.hidden, self.classes).logits(params, jax.nn.relu(x @ params["first"] + params["offset"]))


@dataclasses.dataclass(frozen=True)
class Fetched:
    """The discrete key-value bottleneck; it reads the indices of nearest keys."""

    config: BottleneckConfig

    def init(self, key: Array) -> PyTree:
        index = jnp.zeros((1, self.config.codebooks), jnp.int32)
        return Bottleneck(self.config).init(key, index, method="read")["params"]

    def logits(self, params: PyTree, x: Array) -> Array:
        return Bottleneck(self.config).apply({"params": params}, x, method="read")  # pyright: ignore[reportReturnType]


def bottleneck(name: str, config: BottleneckConfig, codebooks: Codebooks) -> Contender:
    """A bottleneck with these keys; each value gets 1 / C of a gradient, so rates are multiples of C."""
    shares = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
    if config.decoder == "linear":  # whose own parameters get whole gradients
        shares = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
    scale = config.codebooks if config.decoder == "softmax" else 1
    return Contender(name, Fetched(config), tuple(s * scale for s in shares), functools.partial(nearest, codebooks))


@dataclasses.dataclass(frozen=True)
class KeySettings:
    """How keys are found without labels: sizes, passes over the features in batches, settings of `codebook.learn`."""

    codebooks: int = 64
    pairs: int = 64
    key_dim: int = 8
    passes: int = 10
    batch: int = 256
    decay: float = 0.95
    threshold: float = 0.1


def find_keys(key: Array, features: Array, settings: KeySettings) -> Codebooks:
    """Codebooks for features [n, E], which have no labels."""
    for_start, for_order = jax.random.split(key)
    n, batch = features.shape[0], min(settings.batch, features.shape[0])
    codebooks, averages = create(for_start, features, settings.codebooks, settings.pairs, settings.key_dim)
    for one_pass in range(settings.passes):
        for_pass = jax.random.fold_in(for_order, one_pass)
        order = jax.random.permutation(for_pass, n)
        for start in range(0, n - batch + 1, batch):
            chosen = features[order[start : start + batch]]
            drawn = jax.random.fold_in(for_pass, start)
            codebooks, averages = learn(codebooks, averages, chosen, drawn, settings.decay, settings.threshold)
    return codebooks


@functools.partial(jax.jit, static_argnames=("head",))
def descend(head: Head, params: PyTree, x: Array, labels: Array, order: Array, rate: Any) -> PyTree:
    """Parameters after a step of gradient descent on each batch; order int32 [steps, batch] indexes x and labels."""

    def step(params: PyTree, chosen: Array) -> tuple[PyTree, None]:
        gradient = jax.grad(lambda p: loss(head.logits(p, x[chosen]), labels[chosen]))(params)
        return jax.tree.map(lambda p, g: p - rate * g, params, gradient), None

    return jax.lax.scan(step, params, order)[0]
