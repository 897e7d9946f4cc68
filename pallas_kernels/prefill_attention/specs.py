"""Real workloads of `prefill_attention`, read by the tests, benchmarks and tuners."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class PrefillSpec:
    """One workload; letters as in the glossary, `lengths` counts the valid tokens of each row (None: all)."""

    name: str
    batch: int
    kv_heads: int
    groups: int
    tokens: int
    head_dim: int
    dtype: str = "float32"
    window: int | None = None
    softcap: float | None = None
    lengths: tuple[int, ...] | None = None

    @property
    def static(self) -> dict[str, Any]:
        return {"window": self.window, "scale": self.head_dim**-0.5, "softcap": self.softcap}

    def abstract(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Shapes only: (args, kwargs) of the op."""
        dtype = jnp.dtype(self.dtype)
        kv = jax.ShapeDtypeStruct((self.batch, self.kv_heads, self.tokens, self.head_dim), dtype)
        shape = (self.batch, self.kv_heads, self.groups, self.tokens, self.head_dim)
        valid = jax.ShapeDtypeStruct((self.batch, self.tokens), jnp.bool_)
        return (jax.ShapeDtypeStruct(shape, dtype), kv, kv), {"valid": valid, **self.static}

    def arguments(self, seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Random (args, kwargs) of the op."""
        args, kwargs = self.abstract()
        keys = jax.random.split(jax.random.key(seed), len(args))
        lengths = jnp.asarray(self.lengths or (self.tokens,) * self.batch)
        kwargs["valid"] = jnp.arange(self.tokens) < lengths[:, None]
        return tuple(jax.random.normal(k, a.shape, a.dtype) for k, a in zip(keys, args, strict=True)), kwargs


SPECS = (
    PrefillSpec("train_64", 4, 2, 4, 64, 32),
    PrefillSpec("train_1024", 2, 2, 4, 1024, 32),
    PrefillSpec("ragged", 3, 2, 4, 200, 32, lengths=(200, 1, 77)),
    PrefillSpec("empty_row", 2, 1, 2, 33, 64, lengths=(33, 0)),
    PrefillSpec("one_token", 2, 2, 1, 1, 32),
    PrefillSpec("window", 2, 1, 3, 300, 64, window=50, lengths=(300, 290)),
    PrefillSpec("window_long", 1, 1, 1, 1100, 32, window=17),
    PrefillSpec("softcap", 2, 2, 2, 130, 128, softcap=5.0),
    PrefillSpec("bfloat16", 2, 2, 4, 257, 128, dtype="bfloat16", lengths=(257, 100)),
    PrefillSpec("llama_8b", 1, 8, 4, 512, 128, dtype="bfloat16"),
)
