"""Real workloads of `prefill_attention`, read by the tests, benchmarks and tuners."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class PrefillSpec:
    """One workload; letters as in the glossary.

    Attributes:
      lengths: valid tokens of each row (None: all).
      temperature: whether it is given, per "token" [B, T] or per "head" and token [B, K, G, T].
      selection: J, the number of matrices by which tokens hide others; 0 for none. The first token is protected.
    """

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
    temperature: Literal["token", "head"] | None = None
    selection: int = 0

    @property
    def static(self) -> dict[str, Any]:
        return {"window": self.window, "scale": self.head_dim**-0.5, "softcap": self.softcap}

    def arrays(self, seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Random arrays, positional and by name."""
        keys = iter(jax.random.split(jax.random.key(seed), 6))
        row, grouped = (self.batch, self.tokens), (self.batch, self.kv_heads, self.groups, self.tokens)
        kv = (self.batch, self.kv_heads, self.tokens, self.head_dim)
        q, k, v = (jax.random.normal(next(keys), x, self.dtype) for x in ((*grouped, self.head_dim), kv, kv))
        lengths = jnp.asarray(self.lengths or (self.tokens,) * self.batch)
        named: dict[str, Any] = {"valid": jnp.arange(self.tokens) < lengths[:, None]}
        if self.temperature is not None:
            shape = row if self.temperature == "token" else grouped
            named["temperature"] = jax.random.uniform(next(keys), shape, minval=0.5, maxval=1.5)
        if self.selection:
            shape = (self.batch, self.selection, self.tokens, self.head_dim)
            choosers, chosen = (jax.random.normal(next(keys), shape, self.dtype) for _ in range(2))
            named["selection"] = (choosers, chosen.at[:, :, 0].set(0))
        return (q, k, v), named

    def arguments(self, seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Random (args, kwargs) of the op."""
        args, kwargs = self.arrays(seed)
        return args, {**kwargs, **self.static}

    def abstract(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Shapes only: (args, kwargs) of the op."""
        args, kwargs = jax.eval_shape(self.arrays)
        return args, {**kwargs, **self.static}


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
    PrefillSpec("temperature", 2, 2, 2, 150, 64, lengths=(150, 90), softcap=8.0, temperature="head"),
    PrefillSpec("selective", 2, 2, 3, 150, 32, lengths=(150, 90), window=60, selection=1),
    PrefillSpec("selective_by_head", 1, 2, 1, 130, 64, temperature="token", selection=2),
)

_LLAMA = (1, 8, 4, 4096, 128, "bfloat16")

HARDWARE = (
    PrefillSpec("bf16_g4", *_LLAMA),
    PrefillSpec("bf16_g8_s32k", 1, 2, 8, 32768, 128, "bfloat16"),
    PrefillSpec("f32_g4_h64", 1, 8, 4, 4096, 64),
    PrefillSpec("window_softcap_h256", 1, 4, 2, 4096, 256, "bfloat16", window=1024, softcap=50.0),
    PrefillSpec("temperature", *_LLAMA, temperature="head"),
    PrefillSpec("selective", *_LLAMA, selection=1),
)
"""Workloads of real size, for the table of compiled kernels."""
