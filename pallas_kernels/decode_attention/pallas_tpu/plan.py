"""The static decisions of one call: what a step of the kernel holds, and the shapes of its memory."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp

from pallas_kernels.decode_attention.pallas_tpu.lanes import SUBLANES, up
from pallas_kernels.decode_attention.pallas_tpu.reader import Reader
from pallas_kernels.decode_attention.pallas_tpu.unit import terms, weight_rows
from pallas_kernels.lanes import divisor_at_most
from pallas_kernels.rows import LANES

HEADS = 8
"""kv heads of a row per step: their chains of dependent instructions overlap, which hides the latency of each."""

BLOCK = 2048
"""Slots of a head per step at most."""

MOST = 32
"""Heads of any row per step at most. Where blocks are short, several rows make up for it."""

COPIES = 32
"""Copies of pages per step and array at most; each is issued by itself."""

ROWS = 256
"""Rows of logits per group at most."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is static; heads of a step are numbered (row, kv head), kv heads first.

    A group is a few heads of a step whose logits are rows of one matrix: rows (head, part, query), where part j holds
    slots of part j of their tiles. All parts of a head are softmaxes of their own until the end.

    Attributes:
      keys, values: how slots are read.
      step_rows, step_heads: rows of the batch and kv heads per step.
      group: heads per group.
      block: slots per step.
      queries: queries per kv head, rounded up so that a group fills vector registers.
      softcap, bias, window, logits: as in the op; logits are scaled by log2(e) here.
    """

    keys: Reader
    values: Reader
    step_rows: int
    step_heads: int
    group: int
    block: int
    queries: int
    scale: float
    softcap: float | None
    bias: bool
    window: int | None
    logits: bool
    vmem: int

    @classmethod
    def of(
        cls,
        keys: Reader,
        values: Reader,
        shape: tuple[int, ...],
        slots: int,
        vmem: int,
        page: int | None,
        **options: Any,
    ) -> Plan:
        """For q of `shape` [B, K, R, H], S slots in pages of `page` slots or None, and a vector memory of `vmem` bytes.

        Raises:
          NotImplementedError: too many queries, or pages too small.
        """
        batch, heads, queries, _ = shape
        fold = min(keys.fold, values.fold)
        tile = max(keys.tile, values.tile)
        step_heads = heads if heads <= HEADS or heads % SUBLANES else SUBLANES
        block = min(up(slots, tile), BLOCK)
        step_rows = divisor_at_most(batch, max(1, min(MOST, HEADS * BLOCK // block) // step_heads))
        together = step_rows * step_heads
        queries = min(q for q in (1, 2, 4, 8, up(queries, SUBLANES)) if q >= queries)
        group = next(n for n in range(1, together + 1) if together % n == 0 and _fills(n * fold * queries, n, together))
        while group * fold * queries % SUBLANES:
            queries *= 2
        if group * max(keys.fold, values.fold) * queries > ROWS:
            raise NotImplementedError(f"{queries} queries per kv head are too many for one step")
        room = int(vmem / 6 / (together * (keys.bytes_per_slot + values.bytes_per_slot)))
        block = max(tile, min(block, room) // tile * tile)
        if page is not None:
            if page % tile:
                raise NotImplementedError(
                    f"pages of {page} slots are no multiple of {tile}: each would be cut in memory"
                )
            block = page * max(1, min(block // page, COPIES // together))
        return cls(keys, values, step_rows, step_heads, group, block, queries, vmem=vmem * 7 // 8, **options)

    @property
    def always_masked(self) -> bool:
        """Whether there is one form of the kernel's block, with a mask, and not a faster one without beside it.

        Where numbers are decoded, a mask costs little, and the kernel would be twice as long.
        """
        return self.bias or self.keys.decodes or self.values.decodes

    @property
    def heads(self) -> tuple[tuple[int, int], ...]:
        """(row, kv head) of the heads of a step."""
        return tuple((i, h) for i in range(self.step_rows) for h in range(self.step_heads))

    @property
    def groups(self) -> int:
        return len(self.heads) // self.group

    @property
    def fold(self) -> int:
        """Parts of the softmax; those of the values."""
        return self.values.fold

    @property
    def rows(self) -> int:
        """Rows of a group."""
        return self.group * self.fold * self.queries

    def scratch(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Shape and dtype of what the kernel keeps between steps or between the phases of a step."""
        k, v, f32 = self.keys, self.values, jnp.float32
        heads, groups = len(self.heads), self.groups
        key_rows = self.group * k.fold * self.queries
        out = (self.group * v.planes * v.padded,)
        found: dict[str, tuple[tuple[int, ...], Any]] = {
            "query": ((groups, max(1, k.groups), terms(k.unit) * key_rows, self.group * k.planes * k.padded), k.unit),
            "top": ((groups, self.rows, LANES), f32),
            "total": ((groups, self.rows, LANES), f32),
            "out": ((groups, self.rows, *out), f32),
            "valid": ((heads, self.block), f32),
        }
        if self.bias:
            found["bias"] = ((heads, self.block), f32)
        if self.window is not None:
            found["position"] = ((heads, self.block), f32)
        if k.unit == jnp.int8:
            found["query_scale"] = ((heads, LANES), f32)
        if k.groups:
            found["key_factor"] = ((k.groups, heads, self.block), f32)
        if k.has_summand:
            found["key_summand"] = ((k.groups, heads, self.block), f32)
            found["query_sum"] = ((groups, k.groups, self.rows, LANES), f32)
        if v.groups:
            found["value_factor"] = ((v.groups, heads, self.block), f32)
        if v.has_summand:
            found["value_summand"] = ((v.groups, heads, self.block), f32)
            found["out_summand"] = ((groups, v.groups, self.rows, LANES), f32)
        if v.unit == jnp.int8:
            found["value_scale"] = ((v.groups, heads, LANES), f32)
            found["digits"] = ((groups, out[0] // LANES, weight_rows(v.unit) * self.rows, LANES), jnp.int32)
        return found


def _fills(rows: int, group: int, together: int) -> bool:
    return rows >= SUBLANES or group == together


LOG2E = math.log2(math.e)
