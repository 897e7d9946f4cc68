"""Real workloads of `attention_mass`, read by the tests, benchmarks and tuners."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from pallas_kernels.attention_mass.noise import GumbelNoise


@dataclasses.dataclass(frozen=True)
class MassSpec:
    """One workload; letters as in the glossary. The queries are the last `tokens` of `slots` + `offset` tokens.

    Attributes:
      offset: how far the first query lies behind the last key, less T; 0 is a whole prompt's (or its end's) own keys.
      lengths: valid slots of each row (None: all); queries beyond are invalid.
      temperature: whether it is given, per "token" [B, T] or per "head" and token [B, K, G, T].
      noise: whether Gumbel noise is added.
      own: whether the log-sum-exp is that of these logits, computed and returned, rather than given.
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
    over: str = "sum"
    lengths: tuple[int, ...] | None = None
    temperature: Literal["token", "head"] | None = None
    noise: bool = False
    own: bool = False

    @property
    def static(self) -> dict[str, Any]:
        names = ("window", "softcap", "reduce", "over")
        return {name: getattr(self, name) for name in names} | {"scale": self.head_dim**-0.5, "return_lse": self.own}

    def arrays(self, seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Random arrays; `lse` is a plausible one (logits are at most standard normal), not that of these keys."""
        q_key, k_key, lse_key, temperature_key, noise_key = jax.random.split(jax.random.key(seed), 5)
        shape = (self.batch, self.kv_heads, self.groups, self.tokens, self.head_dim)
        q = jax.random.normal(q_key, shape, self.dtype)
        k = jax.random.normal(k_key, (self.batch, self.kv_heads, self.slots, self.head_dim), self.dtype)
        lse = jax.random.uniform(lse_key, shape[:-1], minval=3.0, maxval=6.0)
        first = self.slots + self.offset - self.tokens
        query_positions = jnp.tile(first + jnp.arange(self.tokens, dtype=jnp.int32), (self.batch, 1))
        key_positions = jnp.tile(jnp.arange(self.slots, dtype=jnp.int32), (self.batch, 1))
        lengths = jnp.asarray(self.lengths or (self.slots,) * self.batch)[:, None]
        named: dict[str, Any] = {
            "query_positions": query_positions,
            "key_positions": key_positions,
            "query_valid": query_positions < lengths + self.offset,
            "key_valid": key_positions < lengths,
        }
        if self.temperature is not None:
            rows = shape[:-1] if self.temperature == "head" else (self.batch, self.tokens)
            named["temperature"] = jax.random.uniform(temperature_key, rows, minval=0.5, maxval=1.5)
        if self.noise:
            named["noise"] = GumbelNoise(jax.random.key_data(noise_key), jnp.arange(self.kv_heads, dtype=jnp.int32))
        return (q, k, None if self.own else lse), named

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
    MassSpec("repetition", 2, 2, 2, 150, 190, 64, offset=60, lengths=(190, 90), reduce="max", over="max", own=True),
    MassSpec("window", 1, 2, 3, 200, 200, 32, window=31),
    MassSpec("softcap_bf16", 2, 1, 4, 96, 96, 128, dtype="bfloat16", softcap=4.0),
    MassSpec("keyformer", 2, 2, 2, 150, 150, 64, lengths=(150, 90), temperature="token", noise=True, own=True),
    MassSpec(
        "noise_given_lse", 1, 2, 3, 40, 140, 32, offset=40, window=90, temperature="head", noise=True, reduce="max"
    ),
)

HARDWARE = (
    MassSpec("prompt_4k", 1, 8, 4, 4096, 4096, 128, "bfloat16"),
    MassSpec("last_64_of_32k", 1, 8, 4, 64, 32768, 128, "bfloat16", reduce="mean"),
    MassSpec("window_max_h64", 1, 4, 8, 4096, 4096, 64, "bfloat16", window=1024, reduce="max"),
    MassSpec("keyformer_4k", 1, 8, 4, 4096, 4096, 128, "bfloat16", temperature="token", noise=True, own=True),
)
"""Workloads of real size, for the table of compiled kernels."""
