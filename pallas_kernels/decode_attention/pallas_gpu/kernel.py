"""The kernel: blocked online softmax over tiles of 64 slots, which bulk copies bring in while others are in use.

The usual roles are swapped: slots are the rows of the matrix instructions, 64 of which are no waste, and queries their
columns, which may be as few as 8. Keys are decoded straight into the registers that the instruction reads; of values,
which it must read by channel, a bfloat16 copy goes through shared memory. Codes are exact in bfloat16, and the float32
side of each product is split into bfloat16 terms, so that results are as exact as in float32.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_attention.pallas_gpu import machine, tiles
from pallas_kernels.decode_attention.pallas_gpu.keys import decoded_planes, keys_of
from pallas_kernels.decode_attention.pallas_gpu.plan import SLOTS, WEIGHT_TERMS, Plan
from pallas_kernels.logits import cap

LOG2E = math.log2(math.e)


def call(plan: Plan, inputs: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
    """Runs the kernel.

    Args:
      plan: static decisions.
      inputs: see `operands.inputs`.

    Returns:
      sums f32 [B, K, splits, len(plan.sums), 64, R] and statistics f32 [B, K, splits, plan.statistics, R]: maximum of
      the logits, total of the weights, and total of weight times scale and times zero for each group of values.
    """
    lead = (plan.batch, plan.heads, plan.splits)
    names = sorted(inputs)
    kernel = plgpu.kernel(
        lambda *refs, **smem: _Block(plan, dict(zip(names, refs, strict=False)), smem).run(*refs[len(names) :]),
        out_type=(
            jax.ShapeDtypeStruct((*lead, len(plan.sums), 64, plan.queries), jnp.float32),
            jax.ShapeDtypeStruct((*lead, plan.statistics, plan.queries), jnp.float32),
        ),
        scratch_types=tiles.scratch(plan, inputs, keys_of(plan).query_rows),
        grid=(plan.splits, plan.heads, plan.batch),
        grid_names=("split", "head", "row"),
        kernel_name="decode_attention",
    )
    return kernel(*(inputs[name] for name in names))


class _Block:
    """One block of the grid: some of the tiles of one (row, head)."""

    def __init__(self, plan: Plan, gmem: dict[str, Any], smem: dict[str, Any]) -> None:
        self.plan, self.gmem, self.smem = plan, gmem, smem
        self.keys = keys_of(plan)
        self.copies = {side: tiles.copies(plan, side, gmem) for side in ("keys", "values")}
        self.row, self.head = jax.lax.axis_index("row"), jax.lax.axis_index("head")
        self.split = jax.lax.axis_index("split")

    def run(self, sums_out: Any, statistics_out: Any) -> None:
        """All steps; writes the block's part of the outputs."""
        plan = self.plan
        begin, end = (self.at("ranges")[i] for i in range(2))
        share = jax.lax.div(end - begin + (plan.splits - 1), jnp.int32(plan.splits))
        self.first = begin + self.split * share
        self.steps = jnp.clip(end - self.first, 0, share)
        for step in map(jnp.int32, range(plan.stages)):
            place = self.place(step)
            for side in self.copies:
                self.fetch(side, step, place)
        self.held = self.keys.prepare(self.at, self.smem)
        if plan.window:
            self.oldest = machine.load(self.gmem["oldest"].at[self.row], machine.COLUMNS)

        tile = (SLOTS, plan.queries)
        state = (
            machine.full((plan.queries,), -jnp.inf, machine.COLUMNS),
            tuple(machine.full(tile, 0.0, machine.TILE) for _ in range(plan.statistics - 1)),
            tuple(machine.full((64, plan.queries), 0.0, machine.TILE) for _ in plan.sums),
        )
        top, totals, sums = jax.lax.fori_loop(0, self.steps, self.step, state)
        at = (self.row, self.head, self.split)
        for i, x in enumerate(sums):
            machine.store_once(sums_out.at[(*at, i)], x)
        for i, x in enumerate([top, *(jnp.sum(x, axis=0) for x in totals)]):
            machine.store_once(statistics_out.at[(*at, i)], x)

    def at(self, name: str) -> Any:
        """This row's and head's part of an input [B or 1, K or 1, ...]."""
        ref = self.gmem[name]
        return ref.at[self.row if ref.shape[0] > 1 else 0, self.head if ref.shape[1] > 1 else 0]

    def start(self, step: jax.Array) -> jax.Array:
        """First slot of a tile; the last one is moved back so that it ends with the store."""
        return jnp.minimum((self.first + step) * SLOTS, self.plan.slots - SLOTS)

    def place(self, step: jax.Array) -> jax.Array:
        """Where the first slot of a tile lies."""
        start, page = self.start(step), self.plan.page
        if page is None:
            return start
        return self.at("table")[jax.lax.div(start, jnp.int32(page))] * page + jax.lax.rem(start, jnp.int32(page))

    def stage(self, step: jax.Array) -> jax.Array:
        return jax.lax.rem(step, jnp.int32(self.plan.stages))

    def fetch(self, side: str, step: jax.Array, place: jax.Array) -> None:
        """Starts the copies of a tile that lies at `place`, if there is such a step."""

        @pl.when(step < self.steps)
        def _() -> None:
            stage, start = self.stage(step), self.start(step)
            for copy in self.copies[side]:
                memory = self.smem[copy.name].at[stage]
                first = jax.lax.div(place if copy.stored else start, jnp.int32(copy.slots))
                source = self.at(copy.name).at[pl.ds(first, memory.shape[0])]
                plgpu.copy_gmem_to_smem(source, memory, self.smem[f"{side}_ready"].at[stage])

    def step(self, step: jax.Array, state: Any) -> Any:
        """One tile: the state after it."""
        plan = self.plan
        top, totals, sums = state
        stage, later = self.stage(step), step + plan.stages
        place = self.place(later)  # asked for early: the answer takes a while where there are pages
        plgpu.barrier_wait(self.smem["keys_ready"].at[stage])
        logits, seen = self.logits(step, stage)

        new_top = jnp.maximum(top, jnp.max(logits, axis=0))
        finite = jnp.where(new_top == -jnp.inf, 0.0, new_top)
        weights = jnp.exp2((logits - machine.along_columns(finite, logits)) * LOG2E)
        shrink = jnp.exp2((top - finite) * LOG2E)
        fade = machine.along_columns(shrink, weights)

        plgpu.barrier_wait(self.smem["values_ready"].at[stage])
        added = self.weighted(weights, seen, stage)
        totals = tuple(x * fade + y for x, y in zip(totals, added, strict=True))
        for group in range(plan.weightings):
            weighting = added[group + 1] if plan.values.packed else weights
            for i, term in enumerate(machine.split(weighting, WEIGHT_TERMS)):
                machine.store_flipped(self.weights(group, i), term)
        values = self.values(seen, stage)
        plgpu.commit_smem()  # the matrix unit sees what was written, and copies may overwrite what was read
        self.fetch("keys", later, place)
        if plan.values.packed:
            self.fetch("values", later, place)
        found = machine.products(
            (64, plan.queries),
            len(plan.sums),
            lambda i: [
                (machine.span(values, plan.sums[i][0] * 64, 64), True, self.weights(plan.sums[i][1], term))
                for term in range(WEIGHT_TERMS)
            ],
        )
        sums = tuple(x * machine.along_columns(shrink, x) + y for x, y in zip(sums, found, strict=True))
        if not plan.values.packed:
            self.fetch("values", later, place)
        return new_top, totals, sums

    def logits(self, step: jax.Array, stage: jax.Array) -> tuple[jax.Array, jax.Array]:
        """f32 [64, R], -inf where not seen, and bool [64]: whether the slot holds a token."""
        plan = self.plan
        x = self.keys.dot(self.held, self.smem, stage)
        added = machine.load(self.smem["added"].at[stage], machine.ROWS)
        if plan.slots % SLOTS:  # slots that the tile before has had already
            new = machine.index((SLOTS,), 0, machine.ROWS) + self.start(step) >= (self.first + step) * SLOTS
            added = jnp.where(new, added, -jnp.inf)
        seen = added > -jnp.inf
        mask = machine.along_rows(seen, x)
        if plan.window:
            positions = machine.load(self.smem["positions"].at[stage], machine.ROWS)
            mask &= machine.along_rows(positions, x) >= machine.along_columns(self.oldest, x)
        x = cap(x, plan.softcap) + machine.along_rows(added, x)
        return jnp.where(mask, x, -jnp.inf), seen

    def weighted(self, weights: jax.Array, seen: jax.Array, stage: jax.Array) -> list[jax.Array]:
        """The weights [64, R], and those times each scale and each zero point of the values."""

        def times(name: str) -> jax.Array:
            x = machine.load(self.smem[f"values_{name}"].at[stage], machine.ROWS).astype(jnp.float32)
            return weights * machine.along_rows(jnp.where(seen, x, 0.0), weights)

        return [weights, *map(times, self.plan.values.affine)]

    def weights(self, group: int, term: int) -> Any:
        """Reference to one term of the weights of a group of values, bfloat16 [R, 64]."""
        begin = (WEIGHT_TERMS * group + term) * self.plan.queries
        return self.smem["weights"].at[begin : begin + self.plan.queries]

    def values(self, seen: jax.Array, stage: jax.Array) -> Any:
        """Reference to values bfloat16 [64, H], finite where not seen."""
        stored, source = self.plan.values, self.smem["values"].at[stage]
        if stored.packed:
            for i, plane in enumerate(decoded_planes(machine.load(source, machine.TILE), stored.bits)):
                self.smem["decoded"][:, i * stored.width : (i + 1) * stored.width] = plane
            return self.smem["decoded"]

        @pl.when(jnp.min(jnp.where(seen, 1, 0)) == 0)
        def _() -> None:
            x = machine.load(source, machine.TILE)
            source[...] = jnp.where(machine.along_rows(seen, x), x, jnp.zeros_like(x))

        return source
