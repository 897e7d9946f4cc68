"""What each step brings into shared memory, and where it lies there."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_attention.pallas_gpu.plan import SLOTS, WEIGHT_TERMS, Plan, Stored


@dataclasses.dataclass(frozen=True)
class Copy:
    """An input [B, K or 1, n, ...] of which each step needs some neighbouring entries.

    Attributes:
      name: of the input, and of the shared memory it is copied to.
      slots: slots per entry.
      memory: shared memory [stages, entries, ...].
      stored: whether it lies where the slots lie, in pages if these do.
    """

    name: str
    slots: int
    memory: Any
    stored: bool = True


def copies(plan: Plan, side: str, inputs: Mapping[str, Any]) -> tuple[Copy, ...]:
    """What a step needs of 'keys' or 'values'; all of it arrives at one barrier."""
    stored: Stored = getattr(plan, side)
    dtype = jnp.uint8 if stored.packed else jnp.bfloat16
    rows = plgpu.SMEM((plan.stages, SLOTS, stored.width), dtype, transforms=tiled(stored.width, stored.itemsize))
    names = [f"{side}_{name}" for name in stored.affine]
    if side == "keys":
        names += ["added", "positions"] if plan.window else ["added"]
    found = [Copy(side, 1, rows)]
    for name in names:
        x = inputs[name]
        slots = stored.block if x.ndim == 4 else 1
        entries = max(1, SLOTS // slots)
        memory = plgpu.SMEM((plan.stages, entries, *x.shape[3:]), x.dtype)
        found.append(Copy(name, slots, memory, name.startswith(side)))
    return tuple(found)


def scratch(plan: Plan, inputs: Mapping[str, Any], query_rows: int) -> dict[str, Any]:
    """Shared memory and barriers by name.

    Args:
      plan: static decisions.
      inputs: arrays of the kernel by name.
      query_rows: rows of `q`, the right side of the products with keys.
    """
    keys, values = plan.keys, plan.values
    memory: dict[str, Any] = {
        "q": plgpu.SMEM((query_rows, keys.head_dim), jnp.bfloat16, transforms=tiled(keys.piece, 2)),
        "weights": plgpu.SMEM(
            (WEIGHT_TERMS * plan.weightings * plan.queries, SLOTS),
            jnp.bfloat16,
            transforms=tiled(min(64, values.width), 2),
        ),
        "q_ready": plgpu.Barrier(),
    }
    if values.packed:
        memory["decoded"] = plgpu.SMEM(
            (SLOTS, values.head_dim), jnp.bfloat16, transforms=tiled(min(64, values.width), 2)
        )
    for side in ("keys", "values"):
        arriving = copies(plan, side, inputs)
        memory |= {copy.name: copy.memory for copy in arriving}
        memory[f"{side}_ready"] = plgpu.Barrier(num_arrivals=len(arriving), num_barriers=plan.stages)
    return memory


def tiled(width: int, itemsize: int) -> tuple[Any, ...]:
    """Tiles of 8 rows whose bytes are permuted so that neither rows nor columns meet in one bank."""
    swizzle = min(128, width * itemsize)
    if swizzle < 32:
        return ()
    return plgpu.TilingTransform((8, swizzle // itemsize)), plgpu.SwizzleTransform(swizzle)
