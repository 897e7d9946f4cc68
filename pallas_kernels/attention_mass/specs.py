"""Real workloads of `attention_mass`, read by the tests, benchmarks and tuners."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class MassSpec:
    """One workload; letters as in the glossary. The queries are the last `tokens` of `slots` + `offset` tokens.

    Attributes:
      offset: how far the first query lies behind the last key, less T; 0 is a whole prompt's (or its end's) own keys.
      lengths: valid slots of each row (None: all); queries beyond are invalid.
    """

    name: str
    batch: int
    kv_heads: int
    groups: int
    tokens: int
    slots: int
    head_dim: int
    dtype: str = "float32"
    offset: int = 0
    window: int | None = None
    softcap: float | None = None
    reduce: str = "sum"
    lengths: tuple[int, ...] | None = None

    @property
    def static(self) -> dict[str, Any]:
        names = ("window", "softcap", "reduce")
        return {name: getattr(self, name) for name in names} | {"scale": self.head_dim**-0.5}

    def arrays(self, seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Random arrays; `lse` is a plausible one (logits are at most standard normal), not that of these keys."""
        q_key, k_key, lse_key = jax.random.split(jax.random.key(seed), 3)
        shape = (self.batch, self.kv_heads, self.groups, self.tokens, self.head_dim)
        q = jax.random.normal(q_key, shape, self.dtype)
        k = jax.random.normal(k_key, (self.batch, self.kv_heads, self.slots, self.head_dim), self.dtype)
        lse = jax.random.uniform(lse_key, shape[:-1], minval=3.0, maxval=6.0)
        first = self.slots + self.offset - self.tokens
        query_positions = jnp.tile(first + jnp.arange(self.tokens, dtype=jnp.int32), (self.batch, 1))
        key_positions = jnp.tile(jnp.arange(self.slots, dtype=jnp.int32), (self.batch, 1))
        lengths = jnp.asarray(self.lengths or (self.slots,) * self.batch)[:, None]
        return (q, k, lse), {
            "query_positions": query_positions,
            "key_positions": key_positions,
            "query_valid": query_positions < lengths + self.offset,
            "key_valid": key_positions < lengths,
        }

    def arguments(self, seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Random (args, kwargs) of the op."""
        args, kwargs = self.arrays(seed)
        return args, {**kwargs, **self.static}

    def abstract(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Shapes only: (args, kwargs) of the op."""
        args, kwargs = jax.eval_shape(self.arrays)
        return args, {**kwargs, **self.static}


SPECS = (
    MassSpec("h2o", 2, 2, 4, 64, 64, 32),
    MassSpec("snapkv", 2, 2, 4, 64, 1000, 32, lengths=(1000, 980)),
    MassSpec("long", 1, 1, 4, 1030, 1030, 32),
    MassSpec("ragged", 3, 1, 2, 130, 130, 64, lengths=(130, 0, 40), reduce="mean"),
    MassSpec("one", 1, 1, 1, 1, 1, 32),
    MassSpec("chunk_after_cache", 2, 2, 2, 37, 300, 64, offset=37, reduce="max"),
    MassSpec("window", 1, 2, 3, 200, 200, 32, window=31),
    MassSpec("softcap_bf16", 2, 1, 4, 96, 96, 128, dtype="bfloat16", softcap=4.0),
)
