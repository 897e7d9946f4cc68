"""Round-to-nearest integer codes with bfloat16 scales (the quantiser of KIVI, Liu et al., 2024, arXiv:2402.02750)."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from kvjax.cache.codec.base import Codec
from kvjax.cache.codec.numbers import whole_bytes
from kvjax.cache.codec.scale import LIMIT, least_scale, round_down
from kvjax.errors import UsageError, unknown
from kvjax.typing import Array, PyTree
from pallas_kernels.loader import IntegerLoader
from pallas_kernels.packing import split
from pallas_kernels.rows import Rows

BITS = (8, 4, 3, 2)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class IntegerStore:
    """Packed codes and their scales, as `pallas_kernels.IntegerLoader` reads them.

    Attributes:
      codes: H·bits/8 uint8 per token, packed in planes (`pallas_kernels.packing`); of 3 bits, the low 2.
      scale: bfloat16. Axis 'token': one array [..., S] per group of neighbouring channels. Axis 'channel': one array
        [..., M, H].
      zero: as `scale`: the value of code 0; None for symmetric codes, where it is -2**(bits - 1) * scale.
      high: H/8 uint8 per token, the high bits of codes of 3 bits; None for others.
    """

    codes: Rows
    scale: tuple[Array, ...]
    zero: tuple[Array, ...] | None
    high: Rows | None = None


@dataclasses.dataclass(frozen=True)
class Integer(Codec):
    """x is kept as `code * scale + zero` with unsigned codes of 8, 4, 3 or 2 bits, packed into bytes.

    A scale group is the set of elements with one scale and zero. Both are stored in bfloat16, zero rounded down and
    scale rounded up so that the codes cover the group, and codes are computed from the stored pair: the error is at
    most `error_bound`, half the stored scale but for float32 rounding. Elements beyond ±`LIMIT` saturate. Elements
    that are not finite take no part in the scales and decode to a value inside their group's range.

    Encoding what was decoded changes nothing for symmetric codes of 4, 3 and 2 bits. Elsewhere the largest code need
    not be in use, because of the rounded scale; then a second encoding may choose a finer scale.

    Attributes:
      bits: 8, 4, 3 or 2.
      axis: 'token' gives each token a scale per `group` channels, in blocks of one token; 'channel' gives each
        channel a scale per `group` tokens, in blocks of `group` tokens.
      group: elements per scale, or the share of a head's channels (axis 'token'); None means all channels of a head
        (axis 'token') or 32 tokens (axis 'channel').
      symmetric: codes for [-absmax, absmax] and no zero point, instead of [min, max].

    Raises:
      UsageError: an attribute has no such value.
    """

    bits: int = 8
    axis: Literal["token", "channel"] = "token"
    group: int | float | None = None
    symmetric: bool = False

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise UsageError(f"Integer codes have {', '.join(map(str, BITS))} bits; got bits={self.bits!r}.")
        if self.axis not in ("token", "channel"):
            raise unknown("axis of Integer", self.axis, ("token", "channel"))
        share = isinstance(self.group, float) and 0 < self.group <= 1 and self.axis == "token"
        if self.group is not None and not share and (not isinstance(self.group, int) or self.group < 1):
            raise UsageError(
                f"Integer needs a group of at least 1 element, a share of the channels in (0, 1], or None; got "
                f"group={self.group!r}."
            )
        if not isinstance(self.symmetric, bool):
            raise UsageError(f"Integer's symmetric is true or false; got {self.symmetric!r}.")

    @property
    def block(self) -> int:
        return 1 if self.axis == "token" else int(self.group or 32)

    def validate(self, head_dim: int) -> None:
        whole_bytes(head_dim, self.bits)
        if head_dim % self._channels(head_dim):
            groups = [g for g in range(2, head_dim + 1) if head_dim % g == 0]
            raise UsageError(
                f"head_dim {head_dim} is not divisible by group {self.group} of {self}. "
                f"Valid groups: {', '.join(map(str, groups))}, or None for one scale per token."
            )

    def encode(self, x: Array, params: PyTree = None) -> IntegerStore:
        *lead, tokens, head_dim = x.shape
        self.validate(head_dim)
        if tokens % self.block:
            raise UsageError(f"{self} encodes blocks of {self.block} tokens; {tokens} tokens are not whole blocks.")
        channels = self._channels(head_dim)
        x = x.astype(jnp.float32).reshape(*lead, tokens // self.block, self.block, head_dim // channels, channels)

        low, high = self._range(x)
        scale, zero = self._scale(low, high)
        step = scale.astype(jnp.float32)
        base = step * -(2.0 ** (self.bits - 1)) if zero is None else zero.astype(jnp.float32)
        inside = jnp.where(jnp.isnan(x), low, jnp.clip(x, low, high))
        codes = jnp.clip(jnp.round((inside - base) / step), 0, 2**self.bits - 1).astype(jnp.uint8)

        def parts(a: Array) -> tuple[Array, ...]:
            return tuple(jnp.moveaxis(a[..., 0, :, 0], -1, 0)) if self.axis == "token" else (a[..., 0, :, 0],)

        low, high = split(codes.reshape(*lead, tokens, head_dim), self.bits)
        return IntegerStore(
            Rows.of(low),
            parts(scale),
            None if zero is None else parts(zero),
            None if high is None else Rows.of(high),
        )

    def loader(self, store: IntegerStore, params: PyTree = None) -> IntegerLoader:
        return IntegerLoader(store.codes, store.scale, store.zero, self.bits, self.block, store.high)

    def error_bound(self, store: IntegerStore) -> Array:
        """f32 [..., S, H]: no element within ±`LIMIT` is further than this from what it decodes to.

        Half the stored scale, and the float32 rounding of `(x - zero) / scale` and of `code * scale + zero`.
        """
        scale = self._spread(store.scale, store)
        levels = 2.0**self.bits
        zero = levels * scale if store.zero is None else jnp.abs(self._spread(store.zero, store))
        return 0.5 * scale + 2.0**-22 * (levels * scale + zero)

    def _spread(self, parts: tuple[Array, ...], store: IntegerStore) -> Array:
        """f32 [..., S, H] of scales or zero points."""
        head_dim = self.loader(store).head_dim
        x = jnp.stack(parts, axis=-1) if self.axis == "token" else jnp.repeat(parts[0], self.block, axis=-2)
        return jnp.repeat(x.astype(jnp.float32), head_dim // x.shape[-1], axis=-1)

    def _channels(self, head_dim: int) -> int:
        """Neighbouring channels that share a scale."""
        if self.axis == "channel":
            return 1
        return max(1, int(head_dim * self.group)) if isinstance(self.group, float) else self.group or head_dim

    def _range(self, x: Array) -> tuple[Array, Array]:
        """Least and largest finite element of each scale group, within ±LIMIT; (0, 0) where nothing is finite."""
        axis = -1 if self.axis == "token" else -3
        finite = jnp.isfinite(x)
        inside = jnp.clip(x, -LIMIT, LIMIT)
        low = jnp.min(jnp.where(finite, inside, LIMIT), axis=axis, keepdims=True)
        high = jnp.max(jnp.where(finite, inside, -LIMIT), axis=axis, keepdims=True)
        some = jnp.any(finite, axis=axis, keepdims=True)
        low, high = jnp.where(some, low, 0.0), jnp.where(some, high, 0.0)
        if self.symmetric:
            high = jnp.maximum(jnp.abs(low), jnp.abs(high))
            low = -high
        return low, high

    def _scale(self, low: Array, high: Array) -> tuple[Array, Array | None]:
        """bfloat16 (scale, zero) whose codes cover [low, high]."""
        if self.symmetric:
            return least_scale(high / (2 ** (self.bits - 1) - 1)), None
        zero = round_down(low)
        return least_scale((high - zero.astype(jnp.float32)) / (2**self.bits - 1)), zero
