"""Packed integer codes with affine scales."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.loader.base import PyTree, static
from pallas_kernels.loader.planes import PlanesLoader, dot_planes, mix_planes
from pallas_kernels.packing import join_planes, unpack_doubled
from pallas_kernels.rows import Rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class IntegerLoader(PlanesLoader):
    """Packed codes of 8, 4, 3 or 2 bits with affine scales: x = code * scale + zero.

    Attributes:
      codes: rows of H·bits/8 uint8 per slot, planes as in `packing`; of 3 bits, the low 2.
      scale: floating. Per slot (size 1): C arrays [..., S], one for each of C groups of H/C neighbouring channels. Per
        block (size > 1): one array [..., M, H].
      zero: as `scale`; None for symmetric codes, whose zero is -2**(bits - 1) * scale.
      bits: bits per code.
      size: slots per block.
      high: rows of H/8 uint8 per slot, the high bits of codes of 3 bits; None for others.
    """

    codes: Rows
    scale: tuple[jax.Array, ...]
    zero: tuple[jax.Array, ...] | None
    bits: int = static()
    size: int = static()
    high: Rows | None = None

    @property
    def block(self) -> int:
        return self.size

    @property
    def slots(self) -> PyTree:
        return self.codes, self.scale, self.zero, self.high

    def with_slots(self, slots: PyTree) -> IntegerLoader:
        codes, scale, zero, high = slots
        return IntegerLoader(codes, scale, zero, self.bits, self.size, high)

    def decode(self) -> jax.Array:
        return jnp.concatenate(self._planes(), axis=-1)

    def dot(self, queries: jax.Array) -> jax.Array:
        return dot_planes(queries, self._planes())

    def mix(self, weights: jax.Array, valid: jax.Array | None) -> jax.Array:
        # A code is always finite, so only scales and zeros of invalid slots have to be silenced.
        seen = None if valid is None else valid.reshape(*valid.shape[:-1], -1, self.block)
        if seen is not None and self.size > 1:
            seen = jnp.any(seen, axis=-1, keepdims=True)
        return mix_planes(weights, self._planes(seen))

    def _planes(self, seen: jax.Array | None = None) -> list[jax.Array]:
        """Decoded channels of each plane, f32 [..., S, P]; scales are 0 where `seen` [..., M, block or 1] is False."""
        scale = self._affine(self.scale)
        zero = scale * -(2.0 ** (self.bits - 1)) if self.zero is None else self._affine(self.zero)
        if seen is not None:
            scale, zero = (jnp.where(seen[..., None], x, 0.0) for x in (scale, zero))
        group = self.head_dim // scale.shape[-1]
        scale, zero = (jnp.repeat(x, group, axis=-1) if x.shape[-1] > 1 else x for x in (scale, zero))
        width = self.codes.width
        if self.bits in (4, 2):
            planes, scale = unpack_doubled(self._blocks(self.codes), self.bits), scale * 0.5
        else:
            high = None if self.high is None else self._blocks(self.high)
            planes = join_planes(self._blocks(self.codes), high, self.bits)

        def cut(x: jax.Array, index: int) -> jax.Array:
            return x if x.shape[-1] == 1 else x[..., index * width : (index + 1) * width]

        return [_flat(p.astype(jnp.float32) * cut(scale, i) + cut(zero, i)) for i, p in enumerate(planes)]

    def _blocks(self, rows: Rows) -> jax.Array:
        """[..., M, block, width]."""
        x = rows.natural()
        return x.reshape(*x.shape[:-2], x.shape[-2] // self.block, self.block, rows.width)

    def _affine(self, parts: tuple[jax.Array, ...]) -> jax.Array:
        """f32 [..., M, 1, C], C = H per block."""
        x = parts[0] if self.size > 1 else jnp.stack(parts, axis=-1)
        return x.astype(jnp.float32)[..., None, :]


def _flat(x: jax.Array) -> jax.Array:
    """[..., M, block, P] -> [..., S, P]."""
    return x.reshape(*x.shape[:-3], x.shape[-3] * x.shape[-2], x.shape[-1])
