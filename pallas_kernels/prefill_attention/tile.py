"""How the TPU kernels cut a causal square: tile sizes, the order in which tiles are visited, and what of one is masked.

The G query heads of a kv head are rows of one matrix (head after head), so that a tile of keys is multiplied with all
of them. A kernel visits only the tiles that causality and the window leave: `walk` lists them at trace time, and the
list steers the copies. Lengths of rows are known at run time only: tiles beyond them are neither fetched nor computed.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from pallas_kernels.lanes import divisor_at_most

LOG2E = math.log2(math.e)
LANES = 128
ROWS = 1024
"""Rows of queries aimed at per tile: enough that loading keys into the matrix unit costs little."""


@dataclasses.dataclass(frozen=True)
class Tiles:
    """The static part of one call.

    Attributes:
      groups: query heads per tile; `splits` tiles make up the G query heads of a kv head.
      tokens: T. dim: H. queries, keys: tokens per tile; powers of two, at least 128.
      window, scale, softcap: as in the op.
    """

    groups: int
    splits: int
    tokens: int
    dim: int
    queries: int
    keys: int
    window: int | None
    scale: float
    softcap: float | None

    @classmethod
    def of(cls, shape: tuple[int, ...], window: int | None, scale: float, softcap: float | None) -> Tiles:
        """For queries of `shape` [B, K, G, T, H]."""
        _, _, group, tokens, dim = shape
        groups = divisor_at_most(group, 16)
        whole = max(LANES, 1 << (tokens - 1).bit_length())
        queries = max(LANES, 1 << (ROWS // groups).bit_length() - 1)
        keys = 512 if groups * queries <= ROWS else 256
        return cls(groups, group // groups, tokens, dim, min(queries, whole), min(keys, whole), window, scale, softcap)

    @property
    def rows(self) -> int:
        return self.groups * self.queries

    def walk(self, by: Literal["query", "key"]) -> tuple[np.ndarray, np.ndarray]:
        """The tiles that have anything to compute, by query tile or by key tile, ascending.

        Returns:
          int32 (major [n + 2], minor [n]): index of the tile on the sorted axis, between two -1 that mark the ends of
          the list, and on the other axis.
        """
        i = np.arange(pl.cdiv(self.tokens, self.queries))[:, None]
        j = np.arange(pl.cdiv(self.tokens, self.keys))
        live = j * self.keys < np.minimum((i + 1) * self.queries, self.tokens)
        if self.window is not None:
            live &= i * self.queries - np.minimum((j + 1) * self.keys, self.tokens) + 1 < self.window
        query, key = np.nonzero(live)
        if by == "key":
            order = np.lexsort((query, key))
            query, key = key[order], query[order]
        return np.pad(query, 1, constant_values=-1).astype(np.int32), key.astype(np.int32)

    def live(self, i: Any, j: Any, length: Any) -> Any:
        """Whether the row reaches into tile (i, j)."""
        return (i * self.queries < length) & (j * self.keys < length)

    def edge(self, i: Any, j: Any, length: Any) -> Any:
        """Whether anything in tile (i, j) is hidden or beyond the row's length."""
        first_query, first_key = i * self.queries, j * self.keys
        cut = first_query < first_key + self.keys - 1
        if self.window is not None:
            cut |= first_query + self.queries - 1 - first_key >= self.window
        return cut | (first_key + self.keys > length) | (first_query + self.queries > length)

    def query_index(self, i: Any, shape: tuple[int, int]) -> jax.Array:
        """Token index of each query: `shape` is [rows, 1] (head after head) or [1, queries]."""
        axis = int(shape[0] == 1)
        return i * self.queries + (jax.lax.broadcasted_iota(jnp.int32, shape, axis) & (self.queries - 1))

    def key_index(self, j: Any, shape: tuple[int, int]) -> jax.Array:
        """Token index of each key: `shape` is [keys, 1] or [1, keys]."""
        return j * self.keys + jax.lax.broadcasted_iota(jnp.int32, shape, int(shape[0] == 1))

    def sees(self, query: jax.Array, key: jax.Array, length: Any) -> jax.Array:
        """Causality, the window and the end of the row, for indices that broadcast to the tile."""
        seen = (key <= query) & (key < length)
        return seen if self.window is None else seen & (query - key < self.window)


def dot(a: jax.Array, b: jax.Array, transposed: bool = False) -> jax.Array:
    """a @ b, or a @ b.T if `transposed`: operands as they are (float32 exactly), sums in float32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    axes = (((1,), (1 if transposed else 0,)), ((), ()))
    return jax.lax.dot_general(a, b, axes, precision=precision, preferred_element_type=jnp.float32)


def wide(x: jax.Array, width: int) -> jax.Array:
    """[n, 128] whose lanes are all equal -> [n, width]."""
    if width <= LANES:
        return x[:, :width]
    whole, rest = divmod(width, LANES)
    return jnp.concatenate([x] * whole + ([x[:, :rest]] if rest else []), axis=1)


def to_columns(ref: Any, groups: int) -> jax.Array:
    """A ref [groups, queries] -> [groups * queries, 128], one number per row in all lanes."""
    return jnp.concatenate([jnp.broadcast_to(ref[g : g + 1], (LANES, ref.shape[1])).T for g in range(groups)], axis=0)


def to_rows(ref: Any, x: jax.Array) -> None:
    """Inverse of `to_columns`: writes [groups * queries, 128] to a ref [groups, queries]."""
    groups, queries = ref.shape
    for g in range(groups):
        ref[g : g + 1] = x[g * queries : (g + 1) * queries].T[:1]
