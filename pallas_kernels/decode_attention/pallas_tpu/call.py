"""The kernel's call: which blocks are in memory at each step, and what the kernel does with them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.decode_attention.pallas_tpu import blocks
from pallas_kernels.decode_attention.pallas_tpu.edges import finish, start
from pallas_kernels.decode_attention.pallas_tpu.mask import Mask
from pallas_kernels.decode_attention.pallas_tpu.plan import Plan
from pallas_kernels.decode_attention.pallas_tpu.reader import Operand, Reader
from pallas_kernels.decode_attention.pallas_tpu.step import Step
from pallas_kernels.loader import Loader
from pallas_kernels.pages import Pages
from pallas_kernels.rows import LANES


@dataclasses.dataclass(frozen=True)
class Slots:
    """Where the slots of a call lie, and which of them are valid; arguments as in the op."""

    count: int
    lengths: Any
    valid: jax.Array | None = None
    positions: jax.Array | None = None
    query_positions: jax.Array | None = None
    bias: jax.Array | None = None
    pages: Pages | None = None


@dataclasses.dataclass(frozen=True)
class PagedRef:
    """References to the pages of a block, [row of the step, kv head of the step or 1, page], as one reference."""

    pages: list[list[list[Any]]]
    shape: tuple[int, ...]

    def __getitem__(self, index: tuple[int, int] | tuple[int, int, slice]) -> jax.Array:
        row, head, *rest = index
        pages = self.pages[row][head]
        start, stop, _ = (rest[0] if rest else slice(None)).indices(self.shape[2])
        each = self.shape[2] // len(pages)
        parts = [
            page[0, 0, max(start - i * each, 0) : min(stop - i * each, each)]
            for i, page in enumerate(pages)
            if start < (i + 1) * each and stop > i * each
        ]
        return jnp.concatenate(parts, axis=0)


def call(plan: Plan, q: jax.Array, keys: Loader, values: Loader, slots: Slots) -> tuple[jax.Array, ...]:
    """The op; see `api.decode_attention`."""
    batch, heads, queries, dim = q.shape
    grid = (batch // plan.step_rows, heads // plan.step_heads, pl.cdiv(slots.count, plan.block))
    state = blocks.states(
        slots.count, plan.block, slots.lengths, slots.valid, slots.positions, slots.query_positions, plan.window
    )
    state = blocks.together(state, plan.step_rows)
    table = jnp.zeros((1, 1, 1), jnp.int32)
    if slots.pages is not None:
        table = jnp.clip(slots.pages.table, 0, keys.count // slots.pages.size - 1)
    scalars = (state, blocks.fetched(state), slots.lengths, table)
    inputs, specs = _inputs(plan, q, keys, values, slots)
    outputs, out_specs = _outputs(plan, q.shape, grid, slots.count)
    flat, tree = jax.tree.flatten(inputs)
    scratch = memory(plan)
    kernel = functools.partial(_kernel, plan, tree, keys, values, len(outputs), slots.lengths.shape[1] == 1)
    out, lse, *logits = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=grid,
            in_specs=jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, pl.BlockSpec)),
            out_specs=out_specs,
            scratch_shapes=jax.tree.leaves(scratch, is_leaf=is_memory),
        ),
        out_shape=outputs,
        compiler_params=parameters(plan, ("parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=4 * batch * heads * queries * slots.count * dim,
            transcendentals=batch * heads * queries * slots.count,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in flat),
        ),
        name="decode_attention",
    )(*scalars, *flat)
    lse = lse.reshape(*grid[:2], plan.step_rows, plan.step_heads, plan.queries)
    return out, lse.swapaxes(1, 2).reshape(batch, heads, plan.queries)[..., :queries], *logits


def _inputs(plan: Plan, q: jax.Array, keys: Loader, values: Loader, slots: Slots) -> tuple[Any, Any]:
    """The arrays that the kernel reads, by name, and how each is cut into blocks."""
    rows, heads = plan.step_rows, plan.step_heads

    def of_slots(x: jax.Array, turned: bool = False) -> pl.BlockSpec:
        shared = x.shape[1] == 1

        def index(b: Any, k: Any, j: Any, state: Any, fetched: Any, *_: Any) -> tuple[Any, ...]:
            at = (0, fetched[b, j]) if turned else (fetched[b, j], *(0,) * (x.ndim - 3))
            return b, 0 if shared else k, *at

        cut = block_shape(x.shape[2:], turned, plan.block, slots.count)
        return pl.BlockSpec((rows, 1 if shared else heads, *cut), index)

    def stored(reader: Reader, loader: Loader) -> tuple[Any, Any]:
        turned = reader.turned(loader)
        if slots.pages is None:
            arrays = jax.tree.map(lambda x, turn: x.swapaxes(2, 3) if turn else x, loader.slots, turned)
            return arrays, jax.tree.map(of_slots, loader.slots, turned)
        if any(jax.tree.leaves(turned)):
            raise NotImplementedError("pages of an array whose channels do not fill the lanes")
        # What has one number per slot is small, and a page of it is less than a tile: it is gathered beforehand.
        natural = slots.pages.gather(loader).slots
        arrays = jax.tree.map(
            lambda x, y: _Copies.of(plan, slots, loader.count, x) if x.ndim > 3 else y, loader.slots, natural
        )
        return (
            jax.tree.map(lambda x: x.arrays if isinstance(x, _Copies) else x, arrays, is_leaf=_is_copies),
            jax.tree.map(lambda x: x.specs if isinstance(x, _Copies) else of_slots(x), arrays, is_leaf=_is_copies),
        )

    def constant(x: jax.Array) -> pl.BlockSpec:
        shared = x.shape[0] == 1
        shape = (1 if shared else heads, *x.shape[1:])
        return pl.BlockSpec(shape, lambda b, k, *_: (0 if shared else k, *(0,) * (x.ndim - 1)))

    inputs: dict[str, Any] = {"q": padded(q, plan.queries)}
    specs: dict[str, Any] = {"q": pl.BlockSpec((rows, heads, *inputs["q"].shape[2:]), _of_row)}
    for name, reader, loader in (("keys", plan.keys, keys), ("values", plan.values, values)):
        constants = reader.constants(loader)
        arrays, cut = stored(reader, loader)
        inputs[name], specs[name] = (arrays, constants), (cut, jax.tree.map(constant, constants))
    # Of many heads a step takes 8, a tile of four bytes a number; of bytes it would be a quarter of one.
    narrow = jnp.int8 if plan.step_heads == q.shape[1] else jnp.int32
    holes = None if slots.valid is None else slots.valid.astype(narrow)
    for name, x in {"holes": holes, "bias": slots.bias, "positions": slots.positions}.items():
        if x is not None:
            inputs[name], specs[name] = x, of_slots(x)
    if slots.query_positions is not None:
        now = jnp.pad(slots.query_positions, ((0, 0), (0, plan.queries - slots.query_positions.shape[1])))
        inputs["queries"] = jnp.broadcast_to(now[..., None], (*now.shape, LANES))
        specs["queries"] = pl.BlockSpec((rows, plan.queries, LANES), lambda b, *_: (b, 0, 0))
    return inputs, specs


@dataclasses.dataclass(frozen=True)
class _Copies:
    """One array of a pool, handed to the kernel once for each page of a block and each head, which differ in index."""

    arrays: Any
    specs: Any

    @classmethod
    def of(cls, plan: Plan, slots: Slots, count: int, x: jax.Array) -> _Copies:
        pages = slots.pages
        assert pages is not None
        many = plan.block // pages.size
        last = pages.table.shape[2] - 1

        def spec(row: int, head: int, page: int) -> pl.BlockSpec:
            def index(b: Any, k: Any, j: Any, state: Any, fetched: Any, lengths: Any, table: Any) -> tuple[Any, ...]:
                b_of, k_of = b * plan.step_rows + row, k * plan.step_heads + head
                at = jnp.minimum(fetched[b, j] * many + page, last)
                number = table[b_of, 0 if pages.table.shape[1] == 1 else k_of, at]
                return 0 if x.shape[0] == 1 else b_of, 0 if x.shape[1] == 1 else k_of, number, *(0,) * (x.ndim - 3)

            return pl.BlockSpec((1, 1, x.shape[2] * pages.size // count, *x.shape[3:]), index)

        alone = x.shape[1] == 1 and pages.table.shape[1] == 1
        heads = range(1 if alone else plan.step_heads)
        each = [[[spec(i, h, p) for p in range(many)] for h in heads] for i in range(plan.step_rows)]
        pool = _in_hbm(x)
        return cls(jax.tree.map(lambda _: pool, each, is_leaf=lambda s: isinstance(s, pl.BlockSpec)), each)


def _in_hbm(x: jax.Array) -> jax.Array:
    """`x`, which XLA leaves in HBM; what has many readers it brings into vector memory, all of it, if there is room."""
    traced = isinstance(x, Tracer)
    return pltpu.with_memory_space_constraint(x, pltpu.HBM) if traced else x


def _is_copies(x: Any) -> bool:
    return isinstance(x, _Copies)


def block_shape(shape: tuple[int, ...], turned: bool, block: int, slots: int) -> tuple[int, ...]:
    """The part of an array [entries of S slots, ...] that belongs to a block; `turned`: the last two axes exchanged."""
    cut = (shape[0] * block // slots, *shape[1:])
    return cut[::-1] if turned else cut


def _of_row(b: Any, k: Any, j: Any, *_: Any) -> tuple[Any, ...]:
    return b, k, 0, 0


def _outputs(plan: Plan, shape: tuple[int, ...], grid: tuple[int, ...], slots: int) -> tuple[Any, Any]:
    batch, heads, queries, _ = shape
    step = (plan.step_rows, plan.step_heads, queries)
    outputs = [
        jax.ShapeDtypeStruct((batch, heads, queries, plan.values.dim), jnp.float32),
        jax.ShapeDtypeStruct((*grid[:2], 1, len(plan.heads) * plan.queries), jnp.float32),
    ]
    specs = [
        pl.BlockSpec((*step, plan.values.dim), _of_row),
        pl.BlockSpec((1, 1, 1, outputs[1].shape[3]), _of_row),
    ]
    if plan.logits:
        outputs.append(jax.ShapeDtypeStruct((batch, heads, queries, slots), jnp.float32))
        specs.append(pl.BlockSpec((*step, plan.block), lambda b, k, j, *_: (b, k, 0, j)))
    return outputs, specs


def _kernel(
    plan: Plan,
    tree: Any,
    keys: Loader,
    values: Loader,
    outputs: int,
    shared: bool,
    state_ref: Any,
    fetched_ref: Any,
    lengths_ref: Any,
    table_ref: Any,
    *refs: Any,
) -> None:
    b, k, j = (pl.program_id(axis) for axis in range(3))
    own = jax.tree.unflatten(tree, refs[: tree.num_leaves])
    out_ref, lse_ref, *logits = refs[tree.num_leaves : tree.num_leaves + outputs]
    at = jax.tree.unflatten(jax.tree.structure(memory(plan), is_leaf=is_memory), refs[tree.num_leaves + outputs :])
    step = make_step(plan, keys, values, own, at)
    state = state_ref[b, j]
    logits_ref = logits[0] if logits else None

    def length(row: int, head: int) -> Any:
        return lengths_ref[b * plan.step_rows + row, 0 if shared else k * plan.step_heads + head]

    pl.when(j == 0)(lambda: start(plan, own["q"], at["own"]))

    @pl.when(state != blocks.DEAD if plan.always_masked else state == blocks.PARTIAL)
    def _() -> None:
        names = ("holes", "bias", "positions", "queries")
        mask = Mask(plan, at["own"], j * plan.block, length, *(own.get(name) for name in names))
        step.block(mask, logits_ref)

    if not plan.always_masked:

        @pl.when(state == blocks.WHOLE)
        def _() -> None:
            step.block(None, logits_ref)

    if logits_ref is not None:

        @pl.when(state == blocks.DEAD)
        def _() -> None:
            logits_ref[...] = jnp.full(logits_ref.shape, -jnp.inf, jnp.float32)

    pl.when(j == pl.num_programs(2) - 1)(lambda: finish(plan, at["own"], out_ref, lse_ref))


def make_step(plan: Plan, keys: Loader, values: Loader, own: Any, at: Any) -> Step:
    """The phases over references: `own` the inputs by name, `at` the scratch memory of `memory`."""

    def operand(name: str, loader: Loader) -> Operand:
        leaves, constants = own[name]
        joined = jax.tree.map(_one_ref, leaves, is_leaf=lambda x: isinstance(x, list))
        return Operand(loader.with_slots(joined), constants, at[name])

    return Step(plan, operand("keys", keys), operand("values", values), at["own"])


def _one_ref(x: Any) -> Any:
    if not isinstance(x, list):
        return x
    page = x[0][0][0]
    return PagedRef(x, (len(x), len(x[0]), page.shape[2] * len(x[0][0]), *page.shape[3:]))


def memory(plan: Plan) -> Any:
    """Scratch memory: that of the readers, by 'keys' and 'values', and that of the step, 'own'."""

    def vmem(shapes: Any) -> Any:
        return jax.tree.map(lambda x: pltpu.VMEM(*x), shapes, is_leaf=_is_shape)

    heads = (plan.step_rows, plan.step_heads)
    readers = (vmem(list(reader.scratch(plan.block, *heads))) for reader in (plan.keys, plan.values))
    return dict(zip(("keys", "values", "own"), (*readers, vmem(plan.scratch())), strict=True))


def parameters(plan: Plan, semantics: Sequence[Literal["parallel", "arbitrary"]]) -> pltpu.CompilerParams:
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=plan.vmem)


def padded(q: jax.Array, queries: int) -> jax.Array:
    """q [B, K, R, H] with rows of 0 up to `queries` of them."""
    return jnp.pad(q, ((0, 0), (0, 0), (0, queries - q.shape[2]), (0, 0))) if q.shape[2] < queries else q


def is_memory(x: Any) -> bool:
    """Whether a leaf describes scratch memory."""
    return hasattr(x, "memory_space")


def _is_shape(x: Any) -> bool:
    return isinstance(x, tuple) and len(x) == 2 and isinstance(x[0], tuple)
