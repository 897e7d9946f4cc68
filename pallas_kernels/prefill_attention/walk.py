"""How the TPU kernels cut a causal square: tile sizes, the order in which tiles are visited, and what of one is masked.

The query heads of a kv head are rows of one matrix (head after head), so that a tile of keys is multiplied with all
of them. A kernel visits only the tiles that causality and the window leave: `walk` lists them at trace time, and the
list steers the copies. Lengths of rows are known at run time only: tiles beyond them are neither fetched nor computed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.lanes import divisor_at_most
from pallas_kernels.tile import LANES, scaled

ROWS = 1024
"""Rows of queries aimed at per tile: enough that loading keys into the matrix unit costs little."""
PART = 512
"""Keys whose logits exist at once: 1,024 rows by 512 keys are 2 MiB in float32."""

Axis = Literal["query", "key"]


@dataclasses.dataclass(frozen=True)
class Tiles:
    """The static part of one call. Kernels see N = K * splits heads of `groups` query heads each.

    Attributes:
      groups: query heads per tile; `splits` tiles make up the G query heads of a kv head.
      tokens: T. dim: H. queries, keys: tokens per tile, powers of two. part: keys computed at once.
      window, scale, softcap: as in the op.
    """

    groups: int
    splits: int
    tokens: int
    dim: int
    queries: int
    keys: int
    part: int
    window: int | None
    scale: float
    softcap: float | None

    @classmethod
    def of(cls, q: jax.Array, window: int | None, scale: float, softcap: float | None) -> Tiles:
        """For queries q [B, K, G, T, H]."""
        _, _, group, tokens, dim = q.shape
        # Wide float32 rows take twice the memory of any other, so there are half as many.
        halves = 1 if dim * q.dtype.itemsize <= 512 else 2
        rows, part = ROWS // halves, max(LANES, PART // halves)
        groups = divisor_at_most(group, rows // LANES)
        whole = max(LANES, 1 << (tokens - 1).bit_length())
        queries, part = min(whole, 1 << (rows // groups).bit_length() - 1), min(whole, part)
        return cls(groups, group // groups, tokens, dim, queries, min(whole, 2 * part), part, window, scale, softcap)

    @property
    def rows(self) -> int:
        return self.groups * self.queries

    @property
    def backward(self) -> Tiles:
        """The tiles of the backward pass, which keeps more per key at once."""
        return dataclasses.replace(self, keys=self.part)

    def walk(self, by: Axis) -> np.ndarray:
        """The tiles that have anything to compute, by query tile or by key tile, ascending.

        Returns:
          int32 [n + 2], `major << 16 | minor`: index of the tile on the axis `by`, and on the other one. A -1 marks
          each end of the list.
        """
        i = np.arange(pl.cdiv(self.tokens, self.queries))[:, None]
        j = np.arange(pl.cdiv(self.tokens, self.keys))
        live = j * self.keys < np.minimum((i + 1) * self.queries, self.tokens)
        if self.window is not None:
            live &= i * self.queries - np.minimum((j + 1) * self.keys, self.tokens) + 1 < self.window
        major, minor = np.nonzero(live if by == "query" else live.T)
        return np.pad(major << 16 | minor, 1, constant_values=-1).astype(np.int32)

    def spec(
        self, axis: Axis, by: Axis, width: int | None = None, *, share: int | None = None, result: bool = False
    ) -> pl.BlockSpec:
        """Tiles along `axis` of an array, in a walk by `by`.

        Args:
          width: length of the array's last axis, None where it has none behind the tokens.
          share: None for an array of query heads [B, N, groups, T, width]; m for [B, N / m, T, width], one for m heads.
          result: every tile is visited. An operand is fetched only as far as its row reaches.
        """
        size = self.queries if axis == "query" else self.keys

        def where(b: Any, n: Any, s: Any, walk: Any, lengths: Any) -> tuple[Any, ...]:
            tile = _major(walk[s + 1]) if axis == by else _minor(walk[s + 1])
            if not result:
                tile = jnp.minimum(tile, jax.lax.div(jnp.maximum(lengths[b] - 1, 0), size))
            head = (n, 0) if share is None else (jax.lax.div(n, share),)
            return (b, *head, tile, *(() if width is None else (0,)))

        inner = (self.groups, size) if share is None else (size,)
        return pl.BlockSpec((None, None, *inner, *(() if width is None else (width,))), where)

    def call(
        self,
        kernel: Callable[[Tiles, Any, Mapping[str, Any]], None],
        by: Axis,
        lengths: jax.Array,
        heads: int,
        operands: Mapping[str, tuple[jax.Array, pl.BlockSpec]],
        results: Mapping[str, tuple[jax.ShapeDtypeStruct, pl.BlockSpec]],
        scratch: Mapping[str, tuple[int, ...]],
    ) -> Sequence[jax.Array]:
        """Runs `kernel(tiles, step, refs)` over rows, heads and the tiles of the walk; scratch is float32."""
        walk = self.walk(by)
        names = (*operands, *results, *scratch)

        def body(walk: Any, lengths: Any, *refs: Any) -> None:
            before, at, after = (walk[pl.program_id(2) + offset] for offset in range(3))
            step = Step(_major(at), _minor(at), lengths[pl.program_id(0)], _major(before), _major(after))
            kernel(self, step, dict(zip(names, refs, strict=True)))

        return pl.pallas_call(
            body,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=2,
                grid=(lengths.shape[0], heads, len(walk) - 2),
                in_specs=[spec for _, spec in operands.values()],
                out_specs=[spec for _, spec in results.values()],
                scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch.values()],
            ),
            out_shape=[shape for shape, _ in results.values()],
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
            name=kernel.__name__.strip("_"),
        )(jnp.asarray(walk), lengths, *(x for x, _ in operands.values()))

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

    def sees(self, query: jax.Array, key: jax.Array, length: Any) -> jax.Array:
        """Causality, the window and the end of the row, for token indices that broadcast to a tile."""
        seen = (key <= query) & (key < length) & (query < length)
        return seen if self.window is None else seen & (query - key < self.window)

    def logits(self, products: jax.Array) -> jax.Array:
        """See `scaled`."""
        return scaled(products, self.scale, self.softcap)


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of a walk: tile `major` of the axis it is sorted by, tile `minor` of the other, the row's length."""

    major: Any
    minor: Any
    length: Any
    before: Any
    after: Any

    @property
    def first(self) -> Any:
        """Whether this step starts a major tile."""
        return self.before != self.major

    @property
    def last(self) -> Any:
        """Whether this step ends a major tile."""
        return self.after != self.major


def _major(entry: Any) -> Any:
    return jax.lax.shift_right_arithmetic(entry, 16)


def _minor(entry: Any) -> Any:
    return entry & 0xFFFF
