"""Bits for the keys and values of each layer (KVTuner, Li et al., 2025, arXiv:2502.04420)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import jax.numpy as jnp

from kvjax.cache.codec import Codec
from kvjax.cache.prompt import attend_prompt
from kvjax.cache.step import Step
from kvjax.errors import UsageError
from kvjax.typing import Array

Bits = tuple[int, int]
"""Of keys and of values."""

PAIRS: tuple[Bits, ...] = tuple((keys, values) for keys in (8, 4, 2) for values in (8, 4, 2))
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


def sensitivity(step: Step, keys: Codec, values: Codec) -> Array:
    """How much of a layer's attention output changes if its keys and values are stored: |o' - o| / |o|, f32 scalar.

    Args:
      step: a prompt (its rotary table is applied here). keys, values: codecs without parameters; a prompt is filled up
        with its last token to whole blocks.
    """
    exact, _ = attend_prompt(step)
    positions = step.positions[:, None]
    rotated = step.keys.swapaxes(1, 2)
    rotated = rotated if step.rope is None else step.rope.rotate(rotated, positions)
    coded = dataclasses.replace(
        step,
        keys=_stored(keys, rotated).swapaxes(1, 2),
        values=_stored(values, step.values.swapaxes(1, 2)).swapaxes(1, 2),
    )
    if step.rope is not None:
        queries = step.rope.rotate(step.queries.swapaxes(1, 2), positions).swapaxes(1, 2)
        coded = dataclasses.replace(coded, queries=queries, rope=None)
    output, _ = attend_prompt(coded)
    seen = step.valid[..., None, None]
    lost, whole = (jnp.where(seen, x.astype(jnp.float32), 0.0) for x in (output - exact, exact))
    return jnp.sqrt(jnp.sum(lost**2) / jnp.sum(whole**2))


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


def _stored(codec: Codec, x: Array) -> Array:
    """f32 x [B, K, T, H] as it is read back."""
    tokens = x.shape[2]
    padded = jnp.pad(x, [(0, 0), (0, 0), (0, -tokens % codec.block), (0, 0)], mode="edge")
    return codec.decode(codec.encode(padded))[:, :, :tokens]
