"""Rotary embedding rules: each turns a base wavelength into the frequencies and the amplitude of a `Rope`.

Rotary embedding: Su et al., 2021, "RoFormer" (arXiv 2104.09864). A scaling rule stretches it to longer
contexts. Frequencies are computed in float64 on the host and stored in float32; only `Dynamic` depends
on the length at hand.
"""

from __future__ import annotations

import abc
import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from kvjax.errors import UsageError
from kvjax.typing import Array
from pallas_kernels.rope import Rope

Floats = NDArray[np.floating]


def base_frequencies(theta: float, head_dim: int) -> Floats:
    """theta ** (-2i / head_dim) for i in [0, head_dim / 2): radians per position, float64."""
    return theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)


class Scaling(abc.ABC):
    """A rule that stretches rotary embedding; values are frozen, hashable dataclasses."""

    @abc.abstractmethod
    def table(self, theta: float, head_dim: int, length: Array) -> Rope:
        """The rotary table for sequences of `length` tokens (int32 scalar, may be traced)."""


def _static(inv_freq: Floats, amplitude: float = 1.0) -> Rope:
    return Rope(jnp.asarray(inv_freq, jnp.float32), jnp.float32(amplitude))


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UsageError(message)


@dataclasses.dataclass(frozen=True)
class Plain(Scaling):
    """No scaling."""

    def table(self, theta: float, head_dim: int, length: Array) -> Rope:
        del length
        return _static(base_frequencies(theta, head_dim))


@dataclasses.dataclass(frozen=True)
class Linear(Scaling):
    """Position interpolation (Chen et al., 2023, arXiv 2306.15595): every frequency divided by `factor`."""

    factor: float

    def __post_init__(self) -> None:
        _require(self.factor > 0, f"linear rope scaling needs factor > 0, got {self.factor}.")

    def table(self, theta: float, head_dim: int, length: Array) -> Rope:
        del length
        return _static(base_frequencies(theta, head_dim) / self.factor)


@dataclasses.dataclass(frozen=True)
class Dynamic(Scaling):
    """NTK-aware scaling that grows with the length (bloc97 and emozilla, 2023).

    Up to `original_positions` tokens it is plain rotary embedding. Beyond, the base becomes
    theta * (factor * length / original - (factor - 1)) ** (H / (H - 2)), where `length` is the largest valid
    position of the whole call plus one, as in transformers. Keys that a cache stored rotated keep the
    frequencies of the call that stored them.
    """

    factor: float
    original_positions: int

    def __post_init__(self) -> None:
        _require(self.factor >= 1, f"dynamic rope scaling needs factor >= 1, got {self.factor}.")
        _require(self.original_positions > 0, f"original_positions must be > 0, got {self.original_positions}.")

    def table(self, theta: float, head_dim: int, length: Array) -> Rope:
        stretch = jnp.maximum(length, self.original_positions).astype(jnp.float32) / self.original_positions
        growth = self.factor * stretch - (self.factor - 1)
        # theta ** (-2i/H) * growth ** (-2i/(H-2)): the growth of the base, raised to the same powers.
        exponents = np.arange(0, head_dim, 2) / max(head_dim - 2, 1)
        plain = jnp.asarray(base_frequencies(theta, head_dim), jnp.float32)
        return Rope(plain * growth ** jnp.asarray(-exponents, jnp.float32), jnp.float32(1.0))


@dataclasses.dataclass(frozen=True)
class Llama3(Scaling):
    """Llama 3.1's rule: long wavelengths divided by `factor`, short ones kept, a ramp between (arXiv 2407.21783)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_positions: int

    def __post_init__(self) -> None:
        _require(self.factor >= 1, f"llama3 rope scaling needs factor >= 1, got {self.factor}.")
        _require(
            0 < self.low_freq_factor < self.high_freq_factor,
            f"llama3 rope scaling needs 0 < low_freq_factor < high_freq_factor, "
            f"got {self.low_freq_factor} and {self.high_freq_factor}.",
        )
        _require(self.original_positions > 0, f"original_positions must be > 0, got {self.original_positions}.")

    def table(self, theta: float, head_dim: int, length: Array) -> Rope:
        del length
        plain = base_frequencies(theta, head_dim)
        turns = self.original_positions * plain / (2 * math.pi)
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = np.clip(kept, 0.0, 1.0)
        return _static(plain * kept + plain / self.factor * (1 - kept))


@dataclasses.dataclass(frozen=True)
class Yarn(Scaling):
    """YaRN (Peng et al., 2023, arXiv 2309.00071): interpolation by wavelength, and a temperature on the logits.

    Channels that turn more than `beta_fast` times within `original_positions` keep their frequency, those below
    `beta_slow` turns are divided by `factor`, with a linear ramp over the channel index between; `truncate`
    rounds the ends of the ramp outwards to whole channels. `amplitude` multiplies cos and sin.
    """

    factor: float
    original_positions: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    amplitude: float | None = None

    def __post_init__(self) -> None:
        _require(self.factor >= 1, f"yarn rope scaling needs factor >= 1, got {self.factor}.")
        _require(self.original_positions > 0, f"original_positions must be > 0, got {self.original_positions}.")
        _require(
            0 < self.beta_slow <= self.beta_fast,
            f"yarn rope scaling needs 0 < beta_slow <= beta_fast, got {self.beta_slow} and {self.beta_fast}.",
        )

    @staticmethod
    def default_amplitude(factor: float, mscale: float = 1.0) -> float:
        """0.1 * mscale * ln(factor) + 1, the paper's fit; 1 where nothing is stretched."""
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    def table(self, theta: float, head_dim: int, length: Array) -> Rope:
        del length
        plain = base_frequencies(theta, head_dim)
        stretched = self._ramp(theta, head_dim)
        amplitude = self.default_amplitude(self.factor) if self.amplitude is None else self.amplitude
        return _static(plain / self.factor * stretched + plain * (1 - stretched), amplitude)

    def _ramp(self, theta: float, head_dim: int) -> Floats:
        """Per channel pair: 0 where the frequency is kept, 1 where it is divided by `factor`."""
        low, high = (self._channel(turns, theta, head_dim) for turns in (self.beta_fast, self.beta_slow))
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        high = high if high != low else low + 0.001  # a ramp of no width is a step
        return np.clip((np.arange(head_dim // 2) - low) / (high - low), 0.0, 1.0)

    def _channel(self, turns: float, theta: float, head_dim: int) -> float:
        """The (fractional) channel pair that makes `turns` rotations over the original context."""
        return head_dim * math.log(self.original_positions / (turns * 2 * math.pi)) / (2 * math.log(theta))


@dataclasses.dataclass(frozen=True)
class Repeated(Scaling):
    """The frequencies of narrower heads, `times` times over: several heads in a row as one (`kvjax.convert.to_latent`).

    Channels l, l + H/(2 · times), ... of a head of H channels turn alike, each against the channel H/2 behind it.
    """

    inner: Scaling
    times: int

    def __post_init__(self) -> None:
        _require(self.times >= 1, f"repeated rope frequencies need times >= 1, got {self.times}.")

    def table(self, theta: float, head_dim: int, length: Array) -> Rope:
        _require(head_dim % (2 * self.times) == 0, f"{head_dim} channels are not {self.times} heads of pairs.")
        one = self.inner.table(theta, head_dim // self.times, length)
        return dataclasses.replace(one, inv_freq=jnp.tile(one.inv_freq, self.times))


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding of some layers: the base wavelength `theta` and how it is stretched."""

    theta: float = 10_000.0
    scaling: Scaling = Plain()

    def __post_init__(self) -> None:
        _require(self.theta > 1, f"rope theta must be > 1, got {self.theta}.")

    def table(self, head_dim: int, length: Array) -> Rope:
        """The `Rope` for heads of `head_dim` channels; `length` is int32 [], tokens at hand (largest position + 1)."""
        return self.scaling.table(self.theta, head_dim, length)
