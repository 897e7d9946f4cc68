"""Packed codes that name the entries of a codebook."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.loader.base import PyTree, static
from pallas_kernels.loader.planes import PlanesLoader, dot_planes, mix_planes
from pallas_kernels.packing import join_planes
from pallas_kernels.rows import Rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CodebookLoader(PlanesLoader):
    """Packed codes of 4, 3, 2 or 1 bits that name entries of a codebook: x = table[code] * scale + offset.

    The entries need not be evenly spaced. One codebook serves all slots: fitted to the layer (KVQuant, Hooper et al.,
    2024, arXiv:2401.18079; its Q-Norm is an affine map of the table) or known beforehand (TurboQuant, Zandieh et al.,
    2025, arXiv:2504.19874). Of 1 bit they are the signs of a sketch (QJL, Zandieh et al., 2024, arXiv:2406.03482).
    Keys scaled per channel are `ScaledLoader(CodebookLoader(…), …)`.

    Attributes:
      codes: rows of H·bits/8 uint8 per slot, planes as in `packing`; of 3 bits, the low 2.
      table: floating [K or 1, 2**bits], finite.
      bits: bits per code.
      high: rows of H/8 uint8 per slot, the high bits of codes of 3 bits; None for others.
      scale: floating [..., S], a factor per slot; None for 1.
      offset: as `scale`; None for 0.
    """

    codes: Rows
    table: jax.Array
    bits: int = static()
    high: Rows | None = None
    scale: jax.Array | None = None
    offset: jax.Array | None = None

    @property
    def block(self) -> int:
        return 1

    @property
    def slots(self) -> PyTree:
        return self.codes, self.high, self.scale, self.offset

    @property
    def per_head(self) -> PyTree:
        return self.table

    def with_slots(self, slots: PyTree) -> CodebookLoader:
        codes, high, scale, offset = slots
        return CodebookLoader(codes, self.table, self.bits, high, scale, offset)

    def decode(self) -> jax.Array:
        x = jnp.concatenate(self._planes(), axis=-1)
        if self.scale is not None:
            x = x * self.scale.astype(jnp.float32)[..., None]
        return x if self.offset is None else x + self.offset.astype(jnp.float32)[..., None]

    def dot(self, queries: jax.Array) -> jax.Array:
        products = dot_planes(queries, self._planes())
        if self.scale is not None:
            products = products * self.scale.astype(jnp.float32)[..., None, :]
        if self.offset is not None:
            products = products + self.offset.astype(jnp.float32)[..., None, :] * queries.sum(axis=-1, keepdims=True)
        return products

    def mix(self, weights: jax.Array, valid: jax.Array | None) -> jax.Array:
        # An entry is always finite, so only scales and offsets of invalid slots have to be silenced.
        scaled = weights if self.scale is None else weights * _seen(self.scale, valid)
        sums = mix_planes(scaled, self._planes())
        return sums if self.offset is None else sums + jnp.sum(weights * _seen(self.offset, valid), -1, keepdims=True)

    def _planes(self) -> list[jax.Array]:
        """Entries of the channels of each plane, f32 [..., S, P]."""
        high = None if self.high is None else self.high.natural()
        planes = join_planes(self.codes.natural(), high, self.bits)
        entries = [x[..., None, None] for x in jnp.moveaxis(self.table.astype(jnp.float32), -1, 0)]
        return [_look_up(plane, entries) for plane in planes]


def _look_up(codes: jax.Array, entries: list[jax.Array]) -> jax.Array:
    """The entry of each code, f32, by one choice per bit: vector units choose faster than they gather."""
    bit = 0
    while len(entries) > 1:
        odd = (codes >> bit) & 1 != 0
        entries = [jnp.where(odd, b, a) for a, b in zip(entries[::2], entries[1::2], strict=True)]
        bit += 1
    return entries[0]


def _seen(x: jax.Array, valid: jax.Array | None) -> jax.Array:
    """f32 [..., 1, S], 0 where not valid."""
    x = x.astype(jnp.float32)
    return (x if valid is None else jnp.where(valid, x, 0.0))[..., None, :]
