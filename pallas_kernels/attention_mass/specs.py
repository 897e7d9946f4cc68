"""Real workloads of `attention_mass`: a prompt that scores itself, and an observation window."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Spec:
    """Sizes of one call; letters as everywhere."""

    batch: int
    kv_heads: int
    groups: int
    tokens: int
    slots: int
    head_dim: int
    window: int | None = None
    softcap: float | None = None
    reduce: str = "sum"
    dtype: str = "float32"

    def abstract(self) -> tuple[Sequence[Any], Mapping[str, Any]]:
        """Abstract (args, kwargs)."""

        def array(shape: tuple[int, ...], dtype: Any = self.dtype) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, dtype)

        b, k, g, t, s = self.batch, self.kv_heads, self.groups, self.tokens, self.slots
        args = (array((b, k, g, t, self.head_dim)), array((b, k, s, self.head_dim)), array((b, k, g, t), jnp.float32))
        kwargs = {
            "query_positions": array((b, t), jnp.int32),
            "key_positions": array((b, s), jnp.int32),
            "query_valid": array((b, t), jnp.bool_),
            "key_valid": array((b, s), jnp.bool_),
            "window": self.window,
            "scale": self.head_dim**-0.5,
            "softcap": self.softcap,
            "reduce": self.reduce,
        }
        return args, kwargs


SPECS = (
    Spec(batch=1, kv_heads=2, groups=4, tokens=64, slots=64, head_dim=32),
    Spec(batch=2, kv_heads=2, groups=1, tokens=7, slots=130, head_dim=64, reduce="mean"),
    Spec(batch=1, kv_heads=1, groups=4, tokens=33, slots=257, head_dim=32, window=16, reduce="max"),
    Spec(batch=2, kv_heads=4, groups=2, tokens=1, slots=96, head_dim=32, softcap=20.0, dtype="bfloat16"),
)
