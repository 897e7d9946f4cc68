"""How logits are made of each format of keys: the products with the queries before mask, cap and bias."""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_attention.pallas_gpu import machine
from pallas_kernels.decode_attention.pallas_gpu.plan import SLOTS, Plan

TERMS = 3
"""bfloat16 numbers whose sum is a query's float32."""


GROUPS_AT_ONCE = 2
"""Groups of channels whose products are in registers together; more would leave none to spare."""


class Keys(abc.ABC):
    """One format. `inputs` is for XLA, the rest for the kernel, where `at` gives the row's and head's part of an input
    and `smem` the shared memory by name."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.stored = plan, plan.keys

    @property
    def query_rows(self) -> int:
        """Rows of `q` in shared memory."""
        return TERMS * self.plan.queries

    @abc.abstractmethod
    def inputs(self, q: jax.Array) -> dict[str, jax.Array]:
        """What is made of the queries q f32 [B, K, R, H]."""

    def prepare(self, at: Any, smem: Mapping[str, Any]) -> Any:
        """What stays in registers during all steps; `q` in shared memory is ready after it."""
        plgpu.copy_gmem_to_smem(at("q"), smem["q"], smem["q_ready"])
        plgpu.barrier_wait(smem["q_ready"])

    @abc.abstractmethod
    def dot(self, held: Any, smem: Mapping[str, Any], stage: jax.Array) -> jax.Array:
        """f32 [64, R]: the products with the tile in `stage`; `held` is from `prepare`."""

    def _products(self, count: int, terms: Callable[[int], list[tuple[Any, bool, Any]]]) -> tuple[jax.Array, ...]:
        return machine.products((SLOTS, self.query_rows), count, terms)

    def _added(self, x: jax.Array, begin: int = 0) -> jax.Array:
        """[64, R] from the products with each term of the queries, small ones first."""
        queries = self.plan.queries
        parts = [machine.columns(x, begin + i * queries, queries) for i in range(TERMS)]
        return functools.reduce(jnp.add, parts[::-1])


class DenseKeys(Keys):
    """bfloat16, which the matrix unit reads where it lies."""

    def inputs(self, q: jax.Array) -> dict[str, jax.Array]:
        return {"q": jnp.concatenate(machine.split_exactly(q, TERMS), axis=-2)}

    def dot(self, held: Any, smem: Mapping[str, Any], stage: jax.Array) -> jax.Array:
        (x,) = self._products(1, lambda _: [(smem["keys"].at[stage], False, smem["q"])])
        return self._added(x)


class SlotKeys(Keys):
    """Codes with scales per slot: x = code · scale + zero, so scales and zeros wait until the channels are summed."""

    def inputs(self, q: jax.Array) -> dict[str, jax.Array]:
        stored = self.stored
        fine = q / stored.unit()

        def by_group(x: jax.Array) -> jax.Array:  # [B, K, R, H] -> [B, K, C, R]
            return jnp.moveaxis(x.reshape(*x.shape[:-1], stored.groups, stored.group).sum(-1), -1, -2)

        offset, total = by_group(stored.offset() * fine), by_group(q)
        if not stored.has_zero:
            offset = offset + stored.symmetric_zero * total
        return {"q": jnp.concatenate(machine.split_exactly(fine, TERMS), axis=-2), "q_offset": offset, "q_sum": total}

    def prepare(self, at: Any, smem: Mapping[str, Any]) -> Any:
        super().prepare(at, smem)
        groups = range(self.stored.groups)
        return [[machine.load(at(name).at[g], machine.COLUMNS) for g in groups] for name in ("q_offset", "q_sum")]

    def dot(self, held: Any, smem: Mapping[str, Any], stage: jax.Array) -> jax.Array:
        stored = self.stored
        planes = decoded_planes(machine.load(smem["keys"].at[stage], machine.TILE), stored.bits)
        sums: list[jax.Array] = []
        for begin in range(0, stored.groups, GROUPS_AT_ONCE):
            count = min(GROUPS_AT_ONCE, stored.groups - begin)
            found = self._products(count, lambda i, begin=begin: self._terms(planes, smem["q"], begin + i))
            sums += [self._added(x) for x in found]

        def slotwise(name: str) -> jax.Array:
            return machine.load(smem[f"keys_{name}"].at[stage], machine.ROWS).astype(jnp.float32)

        parts = []
        for g, (x, offset, total) in enumerate(zip(sums, *held, strict=True)):
            x += machine.along_columns(offset, x)
            x *= machine.along_rows(slotwise(f"scale{g}"), x)
            if stored.has_zero:
                x += machine.along_rows(slotwise(f"zero{g}"), x) * machine.along_columns(total, x)
            parts.append(x)
        return functools.reduce(jnp.add, parts)

    def _terms(self, planes: list[jax.Array], q: Any, group: int) -> list[tuple[Any, bool, Any]]:
        """The products of the channels of a group, as long runs as planes allow."""
        stored = self.stored
        run = min(stored.width, stored.group)
        terms = []
        for channel in range(group * stored.group, (group + 1) * stored.group, run):
            plane, column = divmod(channel, stored.width)
            terms.append((machine.columns(planes[plane], column, run), False, machine.span(q, channel, run)))
        return terms


class BlockKeys(Keys):
    """Codes with scales per channel that a block of slots shares (KIVI, Liu et al., 2024, arXiv:2402.02750).

    Scales and zeros multiply the queries, anew for each block in a step. All slots of the step meet the queries of all
    its blocks, and each slot takes its own.
    """

    @property
    def blocks(self) -> int:
        """In one step."""
        return max(1, SLOTS // self.stored.block)

    @property
    def query_rows(self) -> int:
        return self.blocks * TERMS * self.plan.queries

    def inputs(self, q: jax.Array) -> dict[str, jax.Array]:
        return {"q": jnp.swapaxes(q, -1, -2)}

    def prepare(self, at: Any, smem: Mapping[str, Any]) -> Any:
        stored, queries = self.stored, machine.load_once(at("q"), machine.TILE)
        channel = machine.index((stored.head_dim,), 0, machine.ROWS)
        coarse = machine.full((stored.head_dim,), 0.0, machine.ROWS)
        for plane in range(8 // stored.bits):
            coarse = jnp.where(channel >= plane * stored.width, 2.0 ** -(stored.bits * plane), coarse)
        top = jnp.where(channel >= stored.head_dim - stored.width, 128.0 * 2.0 ** (stored.bits - 8), 0.0)
        return queries, coarse, top

    def dot(self, held: Any, smem: Mapping[str, Any], stage: jax.Array) -> jax.Array:
        stored, queries = self.stored, self.plan.queries
        constants = [self._scale_queries(held, smem, stage, block) for block in range(self.blocks)]
        planes = decoded_planes(machine.load(smem["keys"].at[stage], machine.TILE), stored.bits)
        plgpu.commit_smem()
        width = stored.width
        (x,) = self._products(
            1,
            lambda _: [(plane, False, machine.span(smem["q"], i * width, width)) for i, plane in enumerate(planes)],
        )
        parts = [self._added(x, block * TERMS * queries) for block in range(self.blocks)]
        parts = [part + machine.along_columns(constant, part) for part, constant in zip(parts, constants, strict=True)]
        slot = machine.index(parts[0].shape, 0, machine.TILE)
        out = parts[0]
        for block in range(1, self.blocks):
            out = jnp.where(slot >= block * stored.block, parts[block], out)
        return out

    def _scale_queries(self, held: Any, smem: Mapping[str, Any], stage: jax.Array, block: int) -> jax.Array:
        """Writes the queries times a block's scales; gives [R], what its zeros and the decoding's offsets add."""
        queries, coarse, top = held
        scale = machine.load(smem["keys_scale0"].at[stage, block], machine.ROWS).astype(jnp.float32)
        if self.stored.has_zero:
            zero = machine.load(smem["keys_zero0"].at[stage, block], machine.ROWS).astype(jnp.float32)
        else:
            zero = scale * self.stored.symmetric_zero
        for i, term in enumerate(machine.split(queries * machine.along_rows(scale * coarse, queries), TERMS)):
            row = (block * TERMS + i) * self.plan.queries
            machine.store_flipped(smem["q"].at[row : row + self.plan.queries], term)
        return jnp.sum(queries * machine.along_rows(zero + scale * top, queries), axis=0)


def keys_of(plan: Plan) -> Keys:
    """The reader of the keys of a plan."""
    if not plan.keys.packed:
        return DenseKeys(plan)
    return SlotKeys(plan) if plan.keys.block == 1 else BlockKeys(plan)


def decoded_planes(packed: jax.Array, bits: int) -> list[jax.Array]:
    """bfloat16 [..., P] of each plane of uint8 [..., P], exactly: code · `Stored.unit` - `Stored.offset`.

    Bits stay where they are, so nothing is shifted. The sign of the byte is flipped where they reach it, so that the
    byte, read as a signed number, still grows with the code.
    """
    planes = []
    for i in range(8 // bits):
        part = packed if bits == 8 else packed & jnp.uint8((2**bits - 1) << (bits * i))
        if (i + 1) * bits == 8:
            part = part ^ jnp.uint8(128)
        planes.append(machine.as_signed(part).astype(jnp.bfloat16))
    return planes
