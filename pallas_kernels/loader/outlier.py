"""A few elements that are stored beside a format that would spoil them."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from pallas_kernels.loader.base import Loader, PyTree, mix, static


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OutlierLoader(Loader):
    """x = inner + a sparse residual: at most C elements per slot, or per block of slots, and what each of them adds.

    The dense-and-sparse format of KVQuant (Hooper et al., 2024, arXiv:2401.18079) with a fixed capacity: who encodes
    stores the element minus what `inner` decodes to, and decides what becomes of more than C outliers. A pair that is
    not used has the value 0. Products are read in place: they gain query[channel] · value.

    A map of channels (`ScaledLoader`) goes around this loader, not into it: then residuals are those of the stored
    channels and the map stays free.

    Attributes:
      inner: loader of the dense part.
      index: integers, slot within the block · H + channel. Per slot (size 1): C arrays [..., S]. Per block (size > 1):
        one array [..., M, C].
      value: floating, as `index`.
      size: slots per block.
      first: int32 [K], the number of each head's first channel, where heads share the pairs (a head axis of 1 in
        `index` and `value`) and channels are counted through all heads: slot within the block · K·H + channel. None:
        heads have pairs of their own.
    """

    inner: Loader
    index: tuple[jax.Array, ...]
    value: tuple[jax.Array, ...]
    size: int = static()
    first: jax.Array | None = None

    @property
    def block(self) -> int:
        return math.lcm(self.inner.block, self.size)

    @property
    def granularity(self) -> int:
        return math.lcm(self.block, self.inner.granularity * self.inner.block) // self.block

    @property
    def head_dim(self) -> int:
        return self.inner.head_dim

    @property
    def slots(self) -> PyTree:
        return self.inner.slots, self.index, self.value

    @property
    def per_head(self) -> PyTree:
        return self.inner.per_head, self.first

    @property
    def count(self) -> int:
        return self.inner.count

    def with_slots(self, slots: PyTree) -> OutlierLoader:
        inner, index, value = slots
        return OutlierLoader(self.inner.with_slots(inner), index, value, self.size, self.first)

    def decode(self) -> jax.Array:
        dense = self.inner.decode()
        if self.size == 1:
            return dense + self._spread()
        slot, channel, value = self._pairs()
        sparse = _add_at(value[..., None, :], slot * self.head_dim + channel, self.count * self.head_dim)
        return dense + sparse.reshape(*sparse.shape[:-2], self.count, self.head_dim)

    def dot(self, queries: jax.Array) -> jax.Array:
        slot, channel, value = self._pairs()
        products = _take(queries, channel) * value[..., None, :]
        if self.size == 1:  # pairs in the order of the slots, C times over
            return sum(jnp.split(products, len(self.index), axis=-1), start=self.inner.dot(queries))
        return self.inner.dot(queries) + _add_at(products, slot, self.count)

    def mix(self, weights: jax.Array, valid: jax.Array | None) -> jax.Array:
        if self.size == 1:
            spread = self._spread() if valid is None else jnp.where(valid[..., None], self._spread(), 0.0)
            return self.inner.mix(weights, valid) + mix(weights, spread)
        slot, channel, value = self._pairs()
        if valid is not None:
            value = jnp.where(_take(valid[..., None, :], slot)[..., 0, :], value, 0.0)
        return self.inner.mix(weights, valid) + _add_at(
            _take(weights, slot) * value[..., None, :], channel, self.head_dim
        )

    def _spread(self) -> jax.Array:
        """f32 [..., S, H]: what the pairs of each slot add, by comparing; XLA on a CPU scatters number by number."""
        channels = jnp.arange(self.head_dim)
        # All at once: C times the same few operations take long to compile.
        index, value = (jnp.stack(parts) for parts in (self.index, self.value))
        _, channel, own = self._place(index.astype(jnp.int32), value.astype(jnp.float32))
        out = jnp.zeros((), jnp.float32)
        for at, more in zip(channel, own, strict=True):
            out = out + jnp.where(at[..., None] == channels, more[..., None], 0.0)
        return out

    def _pairs(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Slots and channels int32 [..., n] and values f32 [..., n] of all n pairs."""
        first = jnp.arange(0, self.count, self.size)
        own = jnp.tile(first, len(self.index)) if self.size == 1 else jnp.repeat(first, self.index[0].shape[-1])
        index, value = self._flat(self.index).astype(jnp.int32), self._flat(self.value).astype(jnp.float32)
        within, channel, value = self._place(index, value)
        return own + within, channel, value

    def _place(self, index: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Slots within their block, channels of the own head, and values; 0 for pairs of another head."""
        width = self.head_dim * (1 if self.first is None else len(self.first))
        # Division is a dozen operations, for each of C arrays; a block of one slot needs none.
        within, channel = (jnp.zeros_like(index), index) if self.size == 1 else jnp.divmod(index, width)
        if self.first is None:
            return within, channel, value
        channel = channel - self.first[:, None]
        mine = (channel >= 0) & (channel < self.head_dim)
        return within, jnp.where(mine, channel, 0), jnp.where(mine, value, 0.0)

    def _flat(self, parts: tuple[jax.Array, ...]) -> jax.Array:
        """[..., n] of C arrays [..., S], or of one [..., M, C]."""
        return jnp.concatenate(parts, axis=-1) if self.size == 1 else parts[0].reshape(*parts[0].shape[:-2], -1)


def _take(x: jax.Array, at: jax.Array) -> jax.Array:
    """[..., R, n] of x [..., R, N] at [..., n]."""
    return jnp.take_along_axis(x, at[..., None, :], axis=-1, mode="clip")


def _add_at(x: jax.Array, at: jax.Array, size: int) -> jax.Array:
    """f32 [..., R, size] of zeros, to which x [..., R, n] is added at [..., n]."""
    lead = jnp.broadcast_shapes(x.shape[:-2], at.shape[:-1])
    x = jnp.broadcast_to(x, (*lead, *x.shape[-2:])).reshape(-1, *x.shape[-2:])
    at = jnp.broadcast_to(at, (*lead, at.shape[-1])).reshape(-1, at.shape[-1])
    out = jax.vmap(lambda x, at: jnp.zeros((len(x), size), jnp.float32).at[:, at].add(x, mode="drop"))(x, at)
    return out.reshape(*lead, *out.shape[1:])
