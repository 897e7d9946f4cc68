"""How the TPU kernels of `attention_mass` cut queries and keys, and which tiles have anything to compute.

Positions are data here, so which tiles are hidden is known at run time only. A summary per tile of queries and per tile
of keys decides it; copies stay between the first and the last live tile, and for ascending positions those are all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tile import LANES

HIDDEN, IDLE = jnp.iinfo(jnp.int32).max, jnp.iinfo(jnp.int32).min
"""Positions of a key that no query sees, and of a query that sees no key."""
TOKENS = 512
"""Queries, and keys, per tile at most."""
QUERY_BYTES = 1 << 20
"""Of all query heads' queries in one tile, at most."""

Axis = Literal["query", "key"]


class Summary(NamedTuple):
    """Of the positions in each tile along one axis: int32 [B, tiles] each; `whole` is 0 where a position is invalid."""

    first: jax.Array
    last: jax.Array
    whole: jax.Array

    @classmethod
    def of(cls, positions: jax.Array, size: int) -> Summary:
        """Of [B, n * size], invalid ones being HIDDEN or IDLE."""
        at = positions.reshape(positions.shape[0], -1, size)
        ok = (at != HIDDEN) & (at != IDLE)
        first, last = jnp.where(ok, at, HIDDEN).min(2), jnp.where(ok, at, IDLE).max(2)
        return cls(first, last, ok.all(2).astype(jnp.int32))


@dataclasses.dataclass(frozen=True)
class Tiles:
    """The static part of one call: sizes, tokens per tile of queries and of keys, and the parameters of the op."""

    groups: int
    dim: int
    queries: int
    keys: int
    window: int | None
    scale: float
    softcap: float | None
    reduce: str
    over: str = "sum"

    @classmethod
    def of(
        cls, q: jax.Array, k: jax.Array, window: int | None, scale: float, softcap: float | None, reduce: str, over: str
    ) -> Tiles:
        """For q [B, K, G, T, H] and k [B, K, S, H]; tiles are powers of two from 128 to `TOKENS`."""
        groups, tokens, dim = q.shape[2:]
        fit = QUERY_BYTES // (groups * dim * q.dtype.itemsize)
        queries, keys = (
            max(LANES, 1 << (min(n, TOKENS) - 1).bit_length())
            for n in (min(tokens, 1 << fit.bit_length() - 1), k.shape[2])
        )
        return cls(groups, dim, queries, keys, window, scale, softcap, reduce, over)

    def shows(self, query: Any, key: Any) -> Any:
        """Whether a query at one position sees a key at another."""
        seen = key <= query
        return seen if self.window is None else seen & (query - key < self.window)

    def live(self, query: Summary, key: Summary) -> Any:
        """Whether some query of a tile may see some key of another."""
        some = key.first <= query.last
        return some if self.window is None else some & (query.first - key.last < self.window)

    def clear(self, query: Summary, key: Summary) -> Any:
        """Whether every query of a tile sees every key of another."""
        every = (key.last <= query.first) & (query.whole + key.whole == 2)
        return every if self.window is None else every & (query.last - key.first < self.window)

    def call(
        self,
        kernel: Callable[[Tiles, Any, Any, Mapping[str, Any]], None],
        by: Axis,
        at: Mapping[Axis, jax.Array],
        operands: Mapping[str, jax.Array],
        result: tuple[int, ...],
        scratch: Mapping[str, tuple[int, int]],
    ) -> jax.Array:
        """Runs `kernel(tiles, live, clear, refs)` for every tile along `by`, in order over those of the other axis.

        Args:
          at: positions int32 [B, n * tile] of queries and of keys.
          operands: "q" [B, K, G, T, H], "k" [B, K, S, H]; any other name is a [B, K, G, T].
          result: shape, [B, K, G, T] if by query and [B, K, 1, S] if by key; float32, named "result".
          scratch: float32.
        """
        sides = {"query": Summary.of(at["query"], self.queries), "key": Summary.of(at["key"], self.keys)}
        shown = self.live(
            Summary(*(x[:, :, None] for x in sides["query"])), Summary(*(x[:, None] for x in sides["key"]))
        )
        shown = shown if by == "query" else shown.swapaxes(1, 2)
        _, majors, minors = shown.shape
        low = jnp.argmax(shown, axis=2).astype(jnp.int32)
        high = jnp.maximum(low, minors - 1 - jnp.argmax(shown[:, :, ::-1], axis=2).astype(jnp.int32))
        scalars = [x.reshape(-1) for x in (*sides["query"], *sides["key"], low, high)]

        def spec(name: str, fixed: bool) -> pl.BlockSpec:
            """The tiles of one array: `fixed` while those of the other axis pass."""

            def where(b: Any, n: Any, major: Any, minor: Any, *refs: Any) -> tuple[Any, ...]:
                low, high = (ref[b * majors + major] for ref in refs[-2:])
                tile = major if fixed else jnp.clip(minor, low, high)
                lead = {"query_at": (b, 0), "key_at": (b, 0), "k": (b, n)}.get(name, (b, n, 0))
                return (*lead, tile, 0) if name in ("q", "k") else (*lead, tile)

            return pl.BlockSpec(self._block(name), where)

        names = ("query_at", "key_at", *operands, "result", *scratch)

        def body(*refs: Any) -> None:
            b, major, minor = (pl.program_id(axis) for axis in (0, 2, 3))
            tile = {by: b * majors + major, "key" if by == "query" else "query": b * minors + minor}
            query, key = (
                Summary(*(ref[tile["query"]] for ref in refs[:3])),
                Summary(*(ref[tile["key"]] for ref in refs[3:6])),
            )
            kernel(self, self.live(query, key), self.clear(query, key), dict(zip(names, refs[8:], strict=True)))

        arrays = {"query_at": at["query"][:, None], "key_at": at["key"][:, None], **operands}
        fixed = {"k", "key_at"} if by == "key" else set(arrays) - {"k", "key_at"}
        return pl.pallas_call(
            body,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(scalars),
                grid=(*result[:2], majors, minors),
                in_specs=[spec(name, name in fixed) for name in arrays],
                out_specs=spec("line" if by == "query" else "mass", True),
                scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch.values()],
            ),
            out_shape=jax.ShapeDtypeStruct(result, jnp.float32),
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")),
            name=kernel.__name__,
        )(*scalars, *arrays.values())

    def _block(self, name: str) -> tuple[int | None, ...]:
        line = (None, None, self.groups, self.queries)
        blocks = {
            "q": (*line, self.dim),
            "k": (None, None, self.keys, self.dim),
            "query_at": (None, 1, self.queries),
            "key_at": (None, 1, self.keys),
            "mass": (None, None, 1, self.keys),
        }
        return blocks.get(name, line)
