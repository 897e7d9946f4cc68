"""One step of the kernel: a block of slots of a few heads, in phases, so that the heads' latencies overlap."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.decode_attention.pallas_tpu.lanes import columns, refold, spread, wide
from pallas_kernels.decode_attention.pallas_tpu.plan import LOG2E, Plan
from pallas_kernels.decode_attention.pallas_tpu.reader import Operand
from pallas_kernels.decode_attention.pallas_tpu.unit import (
    WEIGHT_TOP,
    dot,
    logits,
    mixed,
    weight_operand,
)
from pallas_kernels.rows import LANES


class Step:
    """The phases of a step over references to memory; what is static comes from the plan."""

    def __init__(self, plan: Plan, keys: Operand, values: Operand, scratch: dict[str, Any]) -> None:
        self.plan, self.keys, self.values, self.at = plan, keys, values, scratch

    def block(self, mask: Any = None, logits_ref: Any = None) -> None:
        """Adds a block of slots; `mask` None means that all of them are seen."""
        plan = self.plan
        plan.keys.prepare(self.keys)
        plan.values.prepare(self.values)
        if mask is not None:
            mask.prepare()
        self._prepare_keys(mask)
        self._prepare_values(mask)
        scores = [self._scores(g, mask) for g in range(plan.groups)]
        if logits_ref is not None:
            for g, s in enumerate(scores):
                self._store_logits(g, s, logits_ref)
        weights = [self._softmax(g, s) for g, s in enumerate(scores)]
        for g, (operands, fade) in enumerate(weights):
            self._mix(g, operands, fade, mask)

    def _prepare_keys(self, mask: Any) -> None:
        keys, at, heads = self.plan.keys, self.at, self.plan.step_heads
        for c, i in ((c, i) for c in range(keys.groups) for i in range(self.plan.step_rows)):
            own = slice(i * heads, (i + 1) * heads)
            factor, summand = self._affine(keys, self.keys, i, c, mask)
            if "query_scale" in at:
                factor = factor * wide(at["query_scale"][own], factor.shape[1])
            at["key_factor"][c, own] = jnp.broadcast_to(factor, (heads, factor.shape[1]))
            if summand is not None:
                at["key_summand"][c, own] = jnp.broadcast_to(summand, (heads, summand.shape[1]))

    def _prepare_values(self, mask: Any) -> None:
        values, at, heads = self.plan.values, self.at, self.plan.step_heads
        for c, i in ((c, i) for c in range(values.groups) for i in range(self.plan.step_rows)):
            own = slice(i * heads, (i + 1) * heads)
            factor, summand = self._affine(values, self.values, i, c, mask)
            if "value_scale" in at:
                peak = jnp.maximum(jnp.max(jnp.abs(factor), axis=1, keepdims=True), 1e-30)
                at["value_scale"][c, own] = jnp.broadcast_to(peak * (1.0 / WEIGHT_TOP), (heads, LANES))
                factor = jnp.minimum(factor * (WEIGHT_TOP / peak), WEIGHT_TOP)
            at["value_factor"][c, own] = jnp.broadcast_to(factor, (heads, factor.shape[1]))
            if summand is not None:
                at["value_summand"][c, own] = jnp.broadcast_to(summand, (heads, summand.shape[1]))

    def _affine(self, reader: Any, operand: Operand, row: int, group: int, mask: Any) -> Any:
        """Factor and summand of a row's slots, 0 where a slot is not valid, whatever it holds."""
        found = reader.affine(operand.loader, row, group)
        if mask is None:
            return found
        valid = mask.valid(row)
        return tuple(x if x is None else jnp.where(valid > 0, x, 0.0) for x in found)

    def _scores(self, g: int, mask: Any) -> jax.Array:
        """Logits of a group in base 2, f32 [rows, block / fold]."""
        plan, keys, at = self.plan, self.plan.keys, self.at
        planes = [self._planes(keys, self.keys, g, a) for a in range(plan.group)]
        s: Any = 0.0
        for c in range(max(1, keys.groups)):
            blocks = [(a, i, x) for a in range(plan.group) for i in keys.planes_of(c) for x in planes[a][i]]
            starts = [(a * keys.planes + i) * keys.padded for a, i, _ in blocks]
            queries = [at["query"][g, c, :, x : x + keys.lanes] for x in starts]
            products: Any = 0
            for q, k in zip(*(_joined(x) for x in (queries, [x for *_, x in blocks])), strict=True):
                products = products + dot(q, k, transposed=True)
            found = logits(products, keys.unit)
            found = refold(found, plan.group, plan.queries, keys.fold, plan.fold)
            if keys.groups:
                found = found * self._slotwise("key_factor", g, c)
            if keys.has_summand:
                found = found + wide(at["query_sum"][g, c], found.shape[1]) * self._slotwise("key_summand", g, c)
            s = s + found
        if plan.softcap is not None:
            s = jnp.tanh(s) * (plan.softcap * LOG2E)
        return s if mask is None else mask.apply(s, g, lambda name: self._slotwise(name, g))

    def _softmax(self, g: int, s: jax.Array) -> tuple[list[jax.Array], jax.Array]:
        """The running softmax's step; returns the operands of the values' products and what fades the old ones."""
        values, at = self.plan.values, self.at
        old = at["top"][g]
        new = jnp.maximum(old, jnp.max(s, axis=1, keepdims=True))
        fade = jnp.exp2(old - new)
        p = jnp.exp2(s - wide(new, s.shape[1]))
        at["top"][g] = new
        at["total"][g] = at["total"][g] * fade + _lane_sums(p)
        operands = []
        for c in range(max(1, values.groups)):
            if values.has_summand:
                more = _lane_sums(p * self._slotwise("value_summand", g, c))
                at["out_summand"][g, c] = at["out_summand"][g, c] * fade + more
            weights = p * self._slotwise("value_factor", g, c) if values.groups else p
            operands.append(weight_operand(weights, values.unit))
        return operands, fade

    def _mix(self, g: int, operands: list[jax.Array], fade: jax.Array, mask: Any) -> None:
        """Adds the weighted values of a block to those of the blocks before."""
        plan, values, at = self.plan, self.plan.values, self.at
        planes = [self._planes(values, self.values, g, a) for a in range(plan.group)]
        if mask is not None and not values.finite:
            planes = [self._silenced(x, g, a) for a, x in enumerate(planes)]
        sums: dict[tuple[int, int], jax.Array] = {}
        for c, operand in enumerate(operands):
            blocks = [(a, i, x) for a in range(plan.group) for i in values.planes_of(c) for x in planes[a][i]]
            outs = [dot(operand, v) for v in _joined([x for *_, x in blocks])]
            outs = [mixed(x, values.unit, at["digits"].at[g] if "digits" in at else None) for x in outs]
            if "value_scale" in at:
                back = self._headwise("value_scale", g, c)
                outs = [x * wide(back, x.shape[1]) for x in outs]
            for (a, i, _), x in zip(blocks, _cut(outs, values.lanes), strict=True):
                if values.groups > 1:
                    x = jnp.where(values.group_of_lane(i, x.shape[0]) == c, x, 0.0)
                sums[a, i] = sums[a, i] + x if (a, i) in sums else x
        for (a, i), x in sums.items():
            start = (a * values.planes + i) * values.padded
            own = (g, slice(None), slice(start, start + values.lanes))
            at["out"][own] = at["out"][own] * wide(fade, values.lanes) + x

    def _planes(self, reader: Any, operand: Operand, g: int, a: int) -> list[list[jax.Array]]:
        row, head = self.plan.heads[g * self.plan.group + a]
        return reader.read(operand, row, head)

    def _silenced(self, planes: list[list[jax.Array]], g: int, a: int) -> list[list[jax.Array]]:
        """Planes with 0 in place of what is not valid."""
        values, number = self.plan.values, g * self.plan.group + a
        valid = self.at["valid"]

        def keep(t: int) -> jax.Array:
            def chunk(j: int) -> jax.Array:
                start = (t * values.fold + j) * LANES
                return valid[number : number + 1, start : start + LANES]

            return columns(chunk, values.fold, values.width)

        tiles = self.plan.block // (LANES * values.fold)
        kept = jnp.concatenate([keep(t) for t in range(tiles)], axis=0) > 0
        return [[jnp.where(kept, x, jnp.zeros_like(x)) for x in terms] for terms in planes]

    def _slotwise(self, name: str, g: int, *index: int) -> jax.Array:
        """A number per head and slot in the rows of a group, f32 [rows, block / fold]."""
        plan, ref = self.plan, self.at[name]

        def tile(t: int) -> jax.Array:
            def chunk(piece: int) -> jax.Array:
                number = g * plan.group + piece // plan.fold
                start = (t * plan.fold + piece % plan.fold) * LANES
                return ref[(*index, slice(number, number + 1), slice(start, start + LANES))]

            return spread(chunk, plan.group * plan.fold, plan.queries)

        return jnp.concatenate([tile(t) for t in range(plan.block // (LANES * plan.fold))], axis=1)

    def _headwise(self, name: str, g: int, *index: int) -> jax.Array:
        """A number per head in the rows of a group, f32 [rows, 128]."""
        plan, ref = self.plan, self.at[name]

        def chunk(piece: int) -> jax.Array:
            number = g * plan.group + piece // plan.fold
            return ref[(*index, slice(number, number + 1))]

        return spread(chunk, plan.group * plan.fold, plan.queries)

    def _store_logits(self, g: int, s: jax.Array, logits_ref: Any) -> None:
        plan, queries = self.plan, logits_ref.shape[2]
        for a in range(plan.group):
            row, head = plan.heads[g * plan.group + a]
            for j in range(plan.fold):
                first = (a * plan.fold + j) * plan.queries
                for t in range(plan.block // (LANES * plan.fold)):
                    start = (t * plan.fold + j) * LANES
                    x = s[first : first + queries, t * LANES : (t + 1) * LANES] * (1.0 / LOG2E)
                    logits_ref[row, head, :, start : start + LANES] = x


def _joined(blocks: list[jax.Array]) -> list[jax.Array]:
    """Blocks side by side, where they fill whole vector registers, so that one product takes them all."""
    if len(blocks) > 1 and blocks[0].shape[1] % LANES == 0:
        return [jnp.concatenate(blocks, axis=1)]
    return blocks


def _cut(blocks: list[jax.Array], width: int) -> list[jax.Array]:
    """The inverse of `_joined`."""
    return [x[:, start : start + width] for x in blocks for start in range(0, x.shape[1], width)]


def _lane_sums(x: jax.Array) -> jax.Array:
    """[rows, 128]: sums over the vector registers of a row."""
    total = x[:, :LANES]
    for start in range(LANES, x.shape[1], LANES):
        total = total + x[:, start : start + LANES]
    return total
