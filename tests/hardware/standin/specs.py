"""Workloads of the stand-in."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

BLOCK, LANES = 512, 128


@dataclasses.dataclass(frozen=True)
class Spec:
    """S slots; `trouble` is what goes wrong."""

    name: str
    slots: int = 4096
    trouble: str = ""

    def abstract(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x = jax.ShapeDtypeStruct((self.slots, LANES), jnp.int8)
        return (x,), {"bias": jax.ShapeDtypeStruct((LANES,), jnp.float32), "trouble": self.trouble}


HARDWARE = (
    Spec("fine"),
    Spec("unscheduled"),
    *(Spec(trouble, trouble=trouble) for trouble in ("declines", "fails", "aborts", "illegal", "knows_the_chip")),
)
