"""Which slots of a block are seen, and by which query."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.decode_attention.pallas_tpu.lanes import lane, wide
from pallas_kernels.decode_attention.pallas_tpu.plan import LOG2E, Plan
from pallas_kernels.decode_attention.pallas_tpu.reader import own


@dataclasses.dataclass(frozen=True)
class Mask:
    """For one step; references are [rows of the step, kv heads of the step or 1, block] or None.

    Attributes:
      plan: the call's.
      at: scratch memory, by name.
      first: index of the block's first slot.
      length: (row of the step, kv head of the step) -> slots from here on are not valid.
      holes: reference to integers, 0 where a slot is not valid.
      bias: reference to f32.
      positions: reference to int32.
      queries: reference to int32 [rows of the step, rows of a part, 128]: positions of the queries.
    """

    plan: Plan
    at: Any
    first: Any
    length: Callable[[int, int], Any]
    holes: Any = None
    bias: Any = None
    positions: Any = None
    queries: Any = None

    def prepare(self) -> None:
        """Writes what is slot-wise for every head of the step."""
        plan, at = self.plan, self.at
        slot = self.first + lane((1, plan.block))
        for number, (row, head) in enumerate(plan.heads):
            valid = jnp.where(slot < self.length(row, head), 1.0, 0.0)
            if self.holes is not None:
                valid = jnp.where(self._of(self.holes, row, head).astype(jnp.float32) != 0.0, valid, 0.0)
            at["valid"][number : number + 1] = valid
            for name, ref in (("bias", self.bias), ("position", self.positions)):
                if ref is not None:
                    at[name][number : number + 1] = self._of(ref, row, head).astype(jnp.float32)

    def valid(self, row: int) -> jax.Array:
        """f32 [kv heads of the step, block], 1 or 0."""
        heads = self.plan.step_heads
        return self.at["valid"][row * heads : (row + 1) * heads]

    def apply(self, s: jax.Array, g: int, slotwise: Callable[[str], jax.Array]) -> jax.Array:
        """Logits [rows, n] of a group with bias, and -inf where a query does not see a slot."""
        if self.bias is not None:
            s = s + slotwise("bias") * LOG2E
        seen = slotwise("valid") > 0
        plan = self.plan
        if self.queries is not None and plan.window is not None:
            rows = [
                self.queries[plan.heads[g * plan.group + a][0]] for a in range(plan.group) for _ in range(plan.fold)
            ]
            now = wide(jnp.concatenate(rows, axis=0).astype(jnp.float32), s.shape[1])
            seen &= now - slotwise("position") < plan.window
        return jnp.where(seen, s, -jnp.inf)

    def _of(self, ref: Any, row: int, head: int) -> jax.Array:
        """[1, block] of a reference that all heads may share."""
        index = own(ref, head)
        return ref[row, index : index + 1]
