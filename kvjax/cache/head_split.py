"""A layer whose kv heads are cached by different methods: each group of heads has a cache of its own size."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from kvjax.cache.layer_cache import NO_DATA, LayerCache, LayerData, Phase
from kvjax.cache.layout import CacheDims
from kvjax.cache.method import CacheMethod
from kvjax.cache.pool import Part
from kvjax.cache.step import Step
from kvjax.errors import UsageError
from kvjax.typing import Array, PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HeadSplit:
    """Stands wherever a `LayerCache` does.

    Attributes:
      parts: the caches of the groups.
      heads: static; for each group its kv heads, in rising order.
      method, dims: static; of the whole layer.
    """

    parts: tuple[LayerCache, ...]
    heads: tuple[tuple[int, ...], ...] = dataclasses.field(metadata={"static": True})
    method: CacheMethod = dataclasses.field(metadata={"static": True})
    dims: CacheDims = dataclasses.field(metadata={"static": True})

    @classmethod
    def init(
        cls,
        method: CacheMethod,
        dims: CacheDims,
        prompt_lengths: Array | None = None,
        data: LayerData = NO_DATA,
    ) -> HeadSplit:
        """An empty cache; arguments and errors as of `LayerCache.init`."""
        groups = method.by_head(dims)
        group = dims.query_heads // dims.kv_heads
        parts = []
        for heads, part in groups:
            index = jnp.asarray(heads, jnp.int32)
            mine = dataclasses.replace(dims, kv_heads=len(heads), query_heads=group * len(heads))
            cache = LayerCache.init(part, mine, prompt_lengths, _of_heads(data, index, dims.kv_heads))
            parts.append(cache.numbered(dims.layer * dims.kv_heads + index))
        return cls(tuple(parts), tuple(heads for heads, _ in groups), method, dims)

    @property
    def length(self) -> Array:
        """int32 [B]."""
        return self.parts[0].length

    @property
    def phase(self) -> str:
        """As `LayerCache.phase`."""
        return self.parts[0].phase

    @property
    def head_index(self) -> Array:
        """int32 [K]."""
        return self.dims.layer * self.dims.kv_heads + jnp.arange(self.dims.kv_heads, dtype=jnp.int32)

    @property
    def segments(self) -> tuple[Part, ...]:
        """Those of all groups."""
        return tuple(segment for part in self.parts for segment in part.segments)

    def numbered(self, head_index: Array) -> HeadSplit:
        """See `LayerCache.numbered`."""
        return self._with(
            [part.numbered(head_index[jnp.asarray(mine)]) for part, mine in zip(self.parts, self.heads, strict=True)]
        )

    def step(self, step: Step) -> tuple[Array, HeadSplit]:
        """See `LayerCache.step`."""
        output, store = self.read(step)
        return output, store(output)

    def read(self, step: Step) -> tuple[Array, Callable[[Array], HeadSplit]]:
        """See `LayerCache.read`."""
        divided = self._divided(step)
        done = [part.read(mine) for part, (mine, _) in zip(self.parts, divided, strict=True)]
        order = jnp.argsort(jnp.concatenate([queries for _, queries in divided]))
        output = jnp.concatenate([output for output, _ in done], axis=2)[:, :, order]
        return output, lambda after: self._with([store(after) for _, store in done])

    def absorb_prompt(self, step: Step, log_sum_exp: Array, unread: int = 0, scores: Array | None = None) -> HeadSplit:
        """See `LayerCache.absorb_prompt`."""
        parts = []
        for part, heads, (mine, _) in zip(self.parts, self.heads, self._divided(step), strict=True):
            index = jnp.asarray(heads)
            own = None if scores is None else scores[:, index]
            parts.append(part.absorb_prompt(mine, log_sum_exp[:, index], unread, own))
        return self._with(parts)

    def end_prompt(self) -> HeadSplit:
        """See `LayerCache.end_prompt`."""
        return self.in_phase("decode")

    def in_phase(self, phase: Phase) -> HeadSplit:
        """See `LayerCache.in_phase`."""
        return self._with([part.in_phase(phase) for part in self.parts])

    def _with(self, parts: Sequence[LayerCache]) -> HeadSplit:
        return dataclasses.replace(self, parts=tuple(parts))

    def _divided(self, step: Step) -> list[tuple[Step, Array]]:
        """Each group's step, and the query heads that it holds."""
        kv_heads, query_heads = step.keys.shape[2], step.queries.shape[2]
        if kv_heads != self.dims.kv_heads:
            raise UsageError(
                f"a table of head budgets is for all {self.dims.kv_heads} kv heads of a layer, and a device holds only "
                f"{kv_heads}; use ShardingRules(heads=None, kv_heads=None)"
            )
        reads = step.kv_head_of_query or tuple(n * kv_heads // query_heads for n in range(query_heads))
        divided = []
        for heads in self.heads:
            mine = [n for n, k in enumerate(reads) if k in heads]
            index, queries = jnp.asarray(heads), jnp.asarray(mine)
            projection = step.output_projection
            part = dataclasses.replace(
                step,
                queries=step.queries[:, :, queries],
                keys=step.keys[:, :, index],
                values=step.values[:, :, index],
                output_projection=None if projection is None else projection[queries],
                kv_head_of_query=tuple(heads.index(reads[n]) for n in mine),
                value_part=step.value_part and tuple(step.value_part[n] for n in mine),
            )
            divided.append((part, queries))
        return divided


def _of_heads(data: LayerData, heads: Array, total: int) -> LayerData:
    """The data [1, K or 1, ...] of some heads."""

    def pick(leaf: Array) -> Array:
        return jnp.asarray(leaf)[:, heads] if leaf.shape[1] == total and total > 1 else leaf

    def mine(tree: PyTree) -> PyTree:
        return jax.tree.map(pick, tree)

    return LayerData(mine(data.keys), mine(data.values), mine(data.policy))


AnyLayer = LayerCache | HeadSplit
"""The cache of one layer that has keys and values."""


def empty_layer(
    method: CacheMethod, dims: CacheDims, prompt_lengths: Array | None = None, data: LayerData = NO_DATA
) -> AnyLayer:
    """The empty cache of a layer: one, or one for each group of heads that share a budget."""
    method = method.for_layer(dims)
    groups = method.by_head(dims)
    if len(groups) == 1:  # a table that treats all heads of this layer alike
        method, groups = groups[0][1], ()
    return (HeadSplit if groups else LayerCache).init(method, dims, prompt_lengths, data)
