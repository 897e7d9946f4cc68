"""Bits for the keys and values of each layer (KVTuner, Li et al., 2025, arXiv:2502.04420)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.cache.codec import ByLayer, Codec, Integer
from kvjax.cache.layout import CacheDims
from kvjax.cache.method import CacheMethod
from kvjax.cache.policy import Prompt
from kvjax.cache.prompt import attend_prompt
from kvjax.cache.step import Step
from kvjax.calibration.finder import Found, Task
from kvjax.calibration.observe import model_dims, observe
from kvjax.errors import UsageError
from kvjax.typing import Array

Bits = tuple[int, int]
"""Of keys and of values."""

BITS = (8, 4, 2)
PAIRS: tuple[Bits, ...] = tuple((keys, values) for keys in BITS for values in BITS)
"""What the paper chooses from."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """Bits of every layer's keys and values, the sum of the layers' errors, and the mean of all bits."""

    layers: tuple[Bits, ...]
    error: float
    mean_bits: float

    @property
    def table(self) -> str:
        """As the named method `kvtuner` takes it: k8v4-k4v2-…"""
        return "-".join(f"k{keys}v{values}" for keys, values in self.layers)


@dataclasses.dataclass(frozen=True)
class LayerBits:
    """Every layer gets the bits by which the samples' attention outputs change least, within a mean of bits.

    A layer's error with a pair of bits is the root of the summed squared change of its attention output over that of
    the output, over all samples, when keys and values are stored by the method's codecs with these bits and everything
    else is exact (`Losses`); then `choose` decides. The paper measures errors in the same way and searches by the
    accuracy of answers, with layers in groups.

    Attributes:
      mean_bits: the limit, over layers, keys and values; scales do not count. None: what the method's own table spends.
    """

    mean_bits: float | None = None

    @property
    def reads(self) -> bool:
        return True

    def fits(self, method: CacheMethod, dims: tuple[CacheDims, ...]) -> bool:
        return all(
            isinstance(table, ByLayer) and all(isinstance(codec, Integer) for codec in table.codecs)
            for table in method.codecs
        )

    def find(self, task: Task) -> Found:
        keys, values = (_with_bits(table) for table in task.method.codecs)
        for codec in (*keys, *values):
            codec.validate(task.model.config.head_dim)
        lost = []
        with task.track("errors", task.steps) as advance:
            for tokens, lengths in task.given.batches(task.batch):
                seen = observe(task.model, Losses(keys, values), tokens, lengths)
                lost.append(np.stack([np.asarray(layer, np.float64).sum(0) for layer in seen]))
                advance()
        sums = np.sum(lost, axis=0)
        errors = [dict(zip(PAIRS, np.sqrt(layer[1:] / layer[0]).tolist(), strict=True)) for layer in sums]
        limit = self._limit(task)
        choice = choose(errors, limit)
        tuned = dataclasses.replace(
            task.method,
            keys=ByLayer(tuple(keys[BITS.index(pair[0])] for pair in choice.layers)),
            values=ByLayer(tuple(values[BITS.index(pair[1])] for pair in choice.layers)),
        )
        note = f"bits by layer: {choice.table}, {choice.mean_bits:.3g} on average of at most {limit:.3g}; "
        return Found(tuned, (), (note + f"errors by layer: {_spelled(errors, choice.layers)}",))

    def _limit(self, task: Task) -> float:
        return float(np.mean(_pairs(task))) if self.mean_bits is None else self.mean_bits


@dataclasses.dataclass(frozen=True)
class Losses:
    """A look: f32 [B, 1 + pairs], |o|² of a layer's attention output, and |o' - o|² with every pair of codecs.

    Every token is coded, the newest too; a row's last block is filled up with its last token. Pairs are in the order of
    `itertools.product(keys, values)`.

    Attributes:
      keys, values: codecs without parameters.
    """

    keys: tuple[Codec, ...]
    values: tuple[Codec, ...]

    def __call__(self, prompt: Prompt) -> Array:
        step = prompt.step
        exact, _ = attend_prompt(step)
        keys = jnp.stack([_stored(codec, prompt.keys, prompt.lengths) for codec in self.keys])
        values = jnp.stack([_stored(codec, prompt.values, prompt.lengths) for codec in self.values])
        queries = step.queries.swapaxes(1, 2)
        queries = queries if step.rope is None else step.rope.rotate(queries, step.positions[:, None])
        rotated = dataclasses.replace(step, queries=queries.swapaxes(1, 2), rope=None)

        def squares(x: Array) -> Array:
            return jnp.sum(jnp.where(step.valid[..., None, None], x.astype(jnp.float32), 0.0) ** 2, axis=(1, 2, 3))

        def lost(pair: tuple[Array, Array]) -> Array:
            k, v = (jnp.swapaxes(x[index], 1, 2) for x, index in zip((keys, values), pair, strict=True))
            output, _ = attend_prompt(dataclasses.replace(rotated, keys=k, values=v))
            return squares(output - exact)

        grid = jnp.meshgrid(jnp.arange(len(self.keys)), jnp.arange(len(self.values)), indexing="ij")
        each = jax.lax.map(lost, (grid[0].reshape(-1), grid[1].reshape(-1)))
        return jnp.concatenate([squares(exact)[:, None], each.T], axis=1)


def sensitivity(step: Step, keys: Codec, values: Codec) -> Array:
    """How much of a layer's attention output changes if its keys and values are stored: |o' - o| / |o|, f32 scalar.

    Args:
      step: a prompt. keys, values: codecs without parameters.
    """
    whole, lost = Losses((keys,), (values,))(Prompt(step, jnp.arange(step.keys.shape[2], dtype=jnp.int32))).sum(0)
    return jnp.sqrt(lost / whole)


def pareto(errors: Mapping[Bits, float]) -> dict[Bits, float]:
    """Of the pairs of one layer those that no other beats: fewer or equal bits in all, and no larger error.

    Among equals the one with more bits for keys stays.
    """
    order = sorted(errors, key=lambda pair: (sum(pair), errors[pair], -pair[0]))
    kept: dict[Bits, float] = {}
    for pair in order:
        if not kept or errors[pair] < min(kept.values()):
            kept[pair] = errors[pair]
    return kept


def choose(errors: Sequence[Mapping[Bits, float]], mean_bits: float) -> Choice:
    """The bits of every layer with the least sum of errors whose mean over layers, keys and values is in the limit.

    The paper groups layers and searches; sums of bits are small whole numbers, so the best choice can be had exactly,
    by dynamic programming over the bits spent so far.

    Args:
      errors: for each layer the error (`sensitivity`) of each pair that it may have.
      mean_bits: the limit.

    Raises:
      UsageError: not even the smallest pairs are in the limit.
    """
    best: dict[int, tuple[float, tuple[Bits, ...]]] = {0: (0.0, ())}
    for layer in errors:
        spent: dict[int, tuple[float, tuple[Bits, ...]]] = {}
        for bits, (error, pairs) in best.items():
            for pair, more in pareto(layer).items():
                found = (error + more, (*pairs, pair))
                total = bits + sum(pair)
                if total not in spent or found < spent[total]:
                    spent[total] = found
        best = spent
    allowed = {bits: found for bits, found in best.items() if bits <= mean_bits * 2 * len(errors) + 1e-9}
    if not allowed:
        raise UsageError(
            f"the smallest choice takes {min(best) / (2 * len(errors)):.3g} bits; the limit is {mean_bits}"
        )
    bits = min(allowed, key=lambda bits: (allowed[bits][0], bits))
    error, pairs = allowed[bits]
    return Choice(pairs, error, bits / (2 * len(errors)))


def _with_bits(table: Codec) -> tuple[Integer, ...]:
    """The codecs of a table, which differ in bits alone, with each of `BITS`.

    Raises:
      UsageError: they differ in something else.
    """
    assert isinstance(table, ByLayer)
    first, *others = (tuple(dataclasses.replace(_integer(codec), bits=bits) for bits in BITS) for codec in table.codecs)
    if any(other != first for other in others):
        raise UsageError(f"bits are found for codecs that differ between layers in nothing else; these are {table}")
    return first


def _spelled(errors: Sequence[Mapping[Bits, float]], pairs: Sequence[Bits]) -> str:
    return ", ".join(f"{layer[pair]:.3g}" for layer, pair in zip(errors, pairs, strict=True))


def _pairs(task: Task) -> list[Bits]:
    """What the method's own table gives the layers of the model."""
    layers = [task.method.for_layer(dims) for dims in model_dims(task.model, task.given.length)]
    return [(_integer(layer.keys).bits, _integer(layer.values).bits) for layer in layers]


def _integer(codec: Codec) -> Integer:
    assert isinstance(codec, Integer)
    return codec


def _stored(codec: Codec, x: Array, lengths: Array) -> Array:
    """f32 x [B, K, T, H] as it is read back; tokens behind a row's length are copies of its last one."""
    tokens = x.shape[2]
    place = jnp.arange(tokens + -tokens % codec.block, dtype=jnp.int32)
    filled = jnp.take_along_axis(x, jnp.minimum(place, lengths[:, None] - 1)[:, None, :, None], axis=2)
    return codec.decode(codec.encode(filled))[:, :, :tokens]
