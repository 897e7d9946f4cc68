"""Keys as signs of random projections (QJL)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from kvjax.cache.codec.base import Codec
from kvjax.cache.codec.numbers import bounded, whole_bytes
from kvjax.cache.codec.rotation import sketch
from kvjax.cache.codec.sketched import Signs, estimator
from kvjax.errors import UsageError
from kvjax.typing import Array, PyTree
from pallas_kernels.loader import BlockLoader, Loader, LowRankLoader


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QJLStore:
    """Sketches of the ordinary and of the outlying channels, and which these are.

    Attributes:
      rest: signs and norms of the ordinary channels (of all, without outliers).
      outlying: signs and norms of the outlying channels, or None.
      index: uint8 or uint16 [..., M, outliers], the outlying channels of each group of tokens, or None.
    """

    rest: Signs
    outlying: Signs | None
    index: Array | None


@dataclasses.dataclass(frozen=True)
class QJL(Codec):
    """A key is kept as its norm and the signs of its products with random directions; products have no bias.

    QJL (Zandieh et al., 2024, arXiv:2406.03482): with directions s_i, q·k is estimated by
    sqrt(π/2)/m · |k| · Σ (s_i·q) sign(s_i·k). The query is never coded. In each group of tokens the channels with the
    largest norm over the group are sketched by themselves, because their norm would drown the others'.

    Bits per element: bits + 16/H; with outliers + outlier_bits + 16/H, + 8·outliers/(group·H) (16 where H > 256). The
    directions are constants of the program, fixed by the seed.

    Attributes:
      bits: signs per channel, m = bits · H.
      outliers: outlying channels per group; 0 for none.
      outlier_bits: signs for the outlying channels, per channel of the whole key.
      group: tokens that share outlying channels; encoded as a unit. Without outliers 1 token is.

    Raises:
      UsageError: a number of bits or tokens below 1, or of outliers below 0.
    """

    bits: int = 2
    outliers: int = 8
    outlier_bits: float = 0.5
    group: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        if self.bits < 1 or self.group < 1 or self.outliers < 0 or self.outlier_bits <= 0:
            raise UsageError(f"QJL needs at least 1 bit per channel, 1 token per group and 0 outliers; got {self}")

    @property
    def block(self) -> int:
        return self.group if self.outliers else 1

    def validate(self, head_dim: int) -> None:
        whole_bytes(self.bits * head_dim, 1)
        if self.outliers:
            whole_bytes(int(self.outlier_bits * head_dim), 1)
            if self.outliers >= head_dim:
                raise UsageError(f"QJL cannot sketch {self.outliers} outlying channels of {head_dim} by themselves")

    def encode(self, x: Array, params: PyTree = None) -> QJLStore:
        *lead, tokens, dim = x.shape
        self.validate(dim)
        x = bounded(x)
        if not self.outliers:
            return QJLStore(Signs.of(x, self._directions(dim)), None, None)
        groups = x.reshape(*lead, tokens // self.group, self.group, dim)
        top = jnp.max(jnp.abs(groups), axis=-2)
        strength = jnp.sum((groups / jnp.where(top > 0, top, 1.0)[..., None, :]) ** 2, axis=-2)
        _, index = jax.lax.top_k(2 * jnp.log(top) + jnp.log(strength), self.outliers)
        out = self._outlying(index, dim).reshape(*lead, tokens, dim)
        return QJLStore(
            rest=Signs.of(jnp.where(out, 0.0, x), self._directions(dim)),
            outlying=Signs.of(jnp.where(out, x, 0.0), self._outlier_directions(dim)),
            index=index.astype(jnp.uint8 if dim <= 256 else jnp.uint16),
        )

    def loader(self, store: QJLStore, params: PyTree = None) -> Loader:
        dim = store.rest.codes.width * 8 // self.bits
        if store.index is None:
            return LowRankLoader(store.rest.loader, estimator(self._directions(dim))[None])
        return BlockLoader(store, self._decode_groups, dim, self.group)

    def _decode_groups(self, store: QJLStore) -> Array:
        """f32 [..., S, H]: each estimate counts in its own channels alone."""
        dim = store.rest.codes.width * 8 // self.bits
        assert store.outlying is not None and store.index is not None
        rest = store.rest.loader.decode() @ estimator(self._directions(dim))
        outlying = store.outlying.loader.decode() @ estimator(self._outlier_directions(dim))
        out = self._outlying(store.index, dim)
        return jnp.where(out.reshape(*out.shape[:-3], -1, dim), outlying, rest)

    def _outlying(self, index: Array, dim: int) -> Array:
        """bool [..., M, group, H]: whether a channel is one of [..., M, outliers]."""
        out = (index.astype(jnp.int32)[..., None] == jnp.arange(dim)).any(-2)
        return jnp.broadcast_to(out[..., None, :], (*out.shape[:-1], self.group, dim))

    def _directions(self, dim: int) -> NDArray[np.float32]:
        return sketch(self.bits * dim, dim, self.seed)

    def _outlier_directions(self, dim: int) -> NDArray[np.float32]:
        return sketch(int(self.outlier_bits * dim), dim, self.seed + 1)
