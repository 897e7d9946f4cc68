"""Channels that are stored in several formats."""

from __future__ import annotations

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp

from pallas_kernels.loader.base import Loader, PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ConcatLoader(Loader):
    """The channels of several loaders of the same slots, one after the other.

    Multi-head latent attention (DeepSeek-V2, 2024, arXiv:2405.04434) keeps one latent c [B, 1, S, r] and one
    rotary key [B, 1, S, H'] per token for all heads. Its keys are
    `ConcatLoader((LowRankLoader(DenseLoader(c), up_k), DenseLoader(rotary)))`, its values
    `LowRankLoader(DenseLoader(c), up_v)`, and K is the number of query heads. The core of the keys has one head of
    r + H' channels: the absorbed form.

    Attributes:
      parts: at least one loader; all hold S slots.
    """

    parts: tuple[Loader, ...]

    @property
    def block(self) -> int:
        return math.lcm(*(part.block for part in self.parts))

    @property
    def granularity(self) -> int:
        return math.lcm(self.block, *(part.granularity * part.block for part in self.parts)) // self.block

    @property
    def head_dim(self) -> int:
        return sum(part.head_dim for part in self.parts)

    @property
    def slots(self) -> PyTree:
        return tuple(part.slots for part in self.parts)

    @property
    def per_head(self) -> PyTree:
        return tuple(part.per_head for part in self.parts)

    @property
    def count(self) -> int:
        return self.parts[0].count

    def with_slots(self, slots: PyTree) -> ConcatLoader:
        return ConcatLoader(tuple(part.with_slots(own) for part, own in zip(self.parts, slots, strict=True)))

    def decode(self) -> jax.Array:
        return _joined([part.decode() for part in self.parts])

    @property
    def core(self) -> ConcatLoader:
        return ConcatLoader(tuple(part.core for part in self.parts))

    def to_core(self, queries: jax.Array) -> tuple[jax.Array, jax.Array | float]:
        mapped = [part.to_core(q) for part, q in zip(self.parts, self._cut(queries), strict=True)]
        return _joined([q for q, _ in mapped]), sum(bias for _, bias in mapped)

    def from_core(self, sums: jax.Array, total: jax.Array) -> jax.Array:
        return _joined([part.from_core(x, total) for part, x in zip(self.parts, self.core._cut(sums), strict=True)])

    @property
    def reads_in_place(self) -> bool:
        return all(part.reads_in_place for part in self.parts)

    def dot(self, queries: jax.Array) -> jax.Array:
        first, *rest = (part.dot(q) for part, q in zip(self.parts, self._cut(queries), strict=True))
        return sum(rest, start=first)

    def mix(self, weights: jax.Array, valid: jax.Array | None) -> jax.Array:
        return _joined([part.mix(weights, valid) for part in self.parts])

    def _cut(self, x: jax.Array) -> list[jax.Array]:
        """The channels of each part out of [..., H]."""
        ends = list(itertools.accumulate(part.head_dim for part in self.parts))
        return jnp.split(x, ends[:-1], axis=-1)


def _joined(parts: list[jax.Array]) -> jax.Array:
    """Channels [..., H] of parts whose head axes may be 1 or K."""
    lead = jnp.broadcast_shapes(*(part.shape[:-1] for part in parts))
    return jnp.concatenate([jnp.broadcast_to(part, (*lead, part.shape[-1])) for part in parts], axis=-1)
