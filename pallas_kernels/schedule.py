"""What a TPU kernel hands over so that its static schedule can be measured without a TPU (docs/hardware.md)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class StaticSchedule:
    """One kernel that goes through equal blocks, with nothing that depends on data.

    `pallas_kernels.<op>.pallas_tpu.static_schedule(spec, *, steps, copies)` returns it, or raises
    `NotImplementedError` with the reason why that spec has none. With `copies` keys and values come from HBM as in
    the real kernel; without, they lie in uninitialised VMEM, so that only computing is counted.

    Attributes:
      run: `run(*arguments)` is a single `pallas_call` whose loop has `steps` steps on one core.
      arguments: a `jax.ShapeDtypeStruct` each.
      packed_bytes: bytes of keys and values, scales included, that a step of the real kernel reads from HBM.
      slots: key and value slots (tokens times heads) of a step.
    """

    run: Callable[..., Any]
    arguments: tuple[Any, ...]
    packed_bytes: int
    slots: int
