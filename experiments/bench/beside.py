"""Contests of the ops beside decode attention: prefill attention, attention mass and cache updates."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from experiments.bench.contest import Contest
from experiments.bench.decode import REFERENCE, Size
from experiments.bench.entrant import Arrays, Data, Entrant, Program, compiled, temporaries
from pallas_kernels import attention_mass, cache_update, prefill_attention
from pallas_kernels.attention_mass.specs import MassSpec
from pallas_kernels.cache_update.specs import UpdateSpec
from pallas_kernels.prefill_attention import reference as prefill_reference
from pallas_kernels.prefill_attention.specs import PrefillSpec
from pallas_kernels.rows import Rows, each

LARGEST_SQUARE = 1 << 31
"""Bytes of logits of all pairs of tokens up to which the definition takes part."""


def prefill(size: Size) -> Contest:
    """A whole prompt of `size.context` tokens against itself: ours, the definition, and `jax.nn`."""
    groups = size.query_heads // size.kv_heads
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    spec = PrefillSpec("prompt", size.batch, size.kv_heads, groups, size.context, size.head_dim, dtype)

    def make() -> Arrays:
        args, kwargs = spec.arguments()
        return (*args, kwargs["valid"])

    def first(q: jax.Array, k: jax.Array, v: jax.Array, valid: jax.Array) -> jax.Array:
        end = min(size.context, 64)  # the first queries see the first keys only
        cut = [x[:1, :1, ..., :end, :] for x in (q, k, v)]
        return prefill_reference.run(*cut, valid=valid[:1, :end], **spec.static)[0][0, 0]

    data = Data(make, first)
    output = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(data.abstract[0]))

    def entrant(name: str, function: Any, answer: Any, own: bool = False) -> Entrant:
        return Entrant(name, data, compiled(function), data.nbytes + output, answer, own=own)

    def ours(q: jax.Array, k: jax.Array, v: jax.Array, valid: jax.Array, implementation: str | None) -> Any:
        return prefill_attention(q, k, v, valid=valid, **spec.static, implementation=implementation)

    def theirs(q: jax.Array, k: jax.Array, v: jax.Array, valid: jax.Array) -> jax.Array:
        """In the layout of `jax.nn`: [B, T, N, H]."""
        tokens_first = jnp.moveaxis(q, 3, 1).reshape(size.batch, size.context, -1, size.head_dim)
        out = jax.nn.dot_product_attention(tokens_first, *(jnp.swapaxes(x, 1, 2) for x in (k, v)), is_causal=True)
        return jnp.moveaxis(out.reshape(size.batch, size.context, size.kv_heads, groups, -1), 1, 3)

    def beginning(out: jax.Array) -> jax.Array:
        return out[0, 0, :, :64]

    entrants = [
        entrant("kvjax", partial(ours, implementation=None), lambda result: beginning(result[0]), own=True),
        entrant("jax.nn", theirs, beginning),
    ]
    if 4 * size.batch * size.query_heads * size.context**2 <= LARGEST_SQUARE:
        entrants.append(
            entrant("definition", partial(ours, implementation=REFERENCE), lambda result: beginning(result[0]))
        )
    return Contest("prefill_attention", {**size.case, "dtype": dtype}, tuple(entrants), ("jax.nn", "definition"))


def mass(size: Size, queries: int) -> Contest:
    """The probabilities that the last `queries` tokens of a prompt give to each of its tokens."""
    groups = size.query_heads // size.kv_heads
    spec = MassSpec("prompt", size.batch, size.kv_heads, groups, queries, size.context, size.head_dim)

    def make() -> Arrays:
        args, kwargs = spec.arrays()
        return (*args, kwargs)

    def ours(q: jax.Array, k: jax.Array, lse: jax.Array, arrays: Any, implementation: str | None) -> Any:
        return attention_mass(q, k, lse, **arrays, **spec.static, implementation=implementation)

    def first(q: jax.Array, k: jax.Array, lse: jax.Array, arrays: Any) -> jax.Array:
        q, k, lse = (x[:1, :1] for x in (q, k, lse))
        return ours(q, k, lse, jax.tree.map(lambda x: x[:1], arrays), REFERENCE)[0, 0]

    data = Data(make, first)
    output = 4 * size.batch * size.kv_heads * size.context

    def entrant(name: str, implementation: str | None) -> Entrant:
        function = compiled(partial(ours, implementation=implementation))
        return Entrant(name, data, function, data.nbytes + output, lambda out: out[0, 0], own=implementation is None)

    entrants = [entrant("kvjax", None)]
    if 4 * size.batch * size.query_heads * queries * size.context <= LARGEST_SQUARE:
        entrants.append(entrant("definition", REFERENCE))
    return Contest("attention_mass", {**size.case, "queries": queries}, tuple(entrants), ("definition",))


def update(spec: UpdateSpec) -> Contest:
    """One token or one block written into a store: in place, and into a copy because the old store is kept."""
    data = Data(lambda: spec.arrays())
    written = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(data.abstract[1]))
    entrants = (
        Entrant("kvjax", data, _in_place, written, own=True),
        Entrant("kvjax, old store kept", data, compiled(cache_update), written),
    )
    case = {"batch": spec.batch, "context": spec.slots, "kv_heads": spec.kv_heads, "workload": spec.name}
    return Contest("cache_update", case, entrants, ("kvjax, old store kept",))


def _in_place(data: Data) -> Program:
    """A program that donates its store and writes to it again the next time."""
    program = jax.jit(cache_update, donate_argnums=0).lower(*data.abstract).compile()
    stores: list[Any] = []

    def start(arrays: Arrays) -> Any:
        store, fresh, block = arrays
        stores.append(program(stores.pop() if stores else each(_copied, store), fresh, block))
        return stores[-1]

    return Program(start, jax.block_until_ready, temporaries(program))


def _copied(x: Any) -> Any:
    return Rows(x.data.copy(), x.width) if isinstance(x, Rows) else x.copy()
