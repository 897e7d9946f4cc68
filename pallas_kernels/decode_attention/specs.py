"""Real workloads of `decode_attention`, read by the tests, benchmarks and tuners."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.loader import DenseLoader, IntegerLoader, Loader, RotatedLoader
from pallas_kernels.rope import Rope
from pallas_kernels.rows import Rows


@dataclasses.dataclass(frozen=True)
class Format:
    """How keys or values are stored.

    Attributes:
      bits: 32 and 16 are float32 and bfloat16; 8, 4 and 2 are packed codes.
      block: slots per block of codes; scales are per slot at 1 and per block above.
      group: channels that share a scale where scales are per slot; None means all of a head.
      symmetric: codes without a zero point.
      shared: one store for all kv heads.
      rotated: rotary embedding is applied when the keys are read.
      fold: slots that share a row of codes.
    """

    bits: int = 32
    block: int = 1
    group: int | None = None
    symmetric: bool = False
    shared: bool = False
    rotated: bool = False
    fold: int = 1

    def loader(self, key: jax.Array, batch: int, heads: int, slots: int, dim: int) -> Loader:
        """Random contents; `slots` must be a multiple of `block`."""
        lead = (batch, 1 if self.shared else heads)
        inner = self._inner(key, lead, slots, dim)
        if not self.rotated:
            return inner
        inv_freq = 10_000.0 ** -(jnp.arange(dim // 2) / (dim // 2))
        positions = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32), (batch, 1, slots))
        return RotatedLoader(inner, positions, Rope(inv_freq, jnp.float32(1.0)))

    def _inner(self, key: jax.Array, lead: tuple[int, int], slots: int, dim: int) -> Loader:
        if self.bits > 8:
            dtype = {32: jnp.float32, 16: jnp.bfloat16}[self.bits]
            return DenseLoader(jax.random.normal(key, (*lead, slots, dim), dtype))
        code_key, scale_key, zero_key = jax.random.split(key, 3)
        codes = Rows.of(jax.random.bits(code_key, (*lead, slots, dim * self.bits // 8), jnp.uint8), self.fold)
        levels = 2**self.bits - 1
        groups = dim // (self.group or dim) if self.block == 1 else 1
        shape = (groups, *lead, slots) if self.block == 1 else (1, *lead, slots // self.block, dim)
        scale = (jax.random.uniform(scale_key, shape, minval=1.0, maxval=4.0) / levels).astype(jnp.bfloat16)
        zero = None if self.symmetric else tuple(-jax.random.uniform(zero_key, shape, maxval=3.0).astype(jnp.bfloat16))
        return IntegerLoader(codes, tuple(scale), zero, self.bits, self.block)


@dataclasses.dataclass(frozen=True)
class DecodeSpec:
    """One workload; letters as in the glossary. `lengths` counts the valid slots of each row (None: all)."""

    name: str
    batch: int
    kv_heads: int
    rows: int
    slots: int
    head_dim: int
    keys: Format = Format()
    values: Format = Format()
    window: int | None = None
    softcap: float | None = None
    bias: bool = False
    masks_per_head: bool = False
    lengths: tuple[int, ...] | None = None

    def arguments(self, seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Random (args, kwargs) of the op."""
        q_key, k_key, v_key, mask_key, bias_key = jax.random.split(jax.random.key(seed), 5)
        q = jax.random.normal(q_key, (self.batch, self.kv_heads, self.rows, self.head_dim))
        size = (self.batch, self.kv_heads, self.slots, self.head_dim)
        mask_shape = (self.batch, self.kv_heads if self.masks_per_head else 1, self.slots)
        lengths = jnp.asarray(self.lengths or (self.slots,) * self.batch)
        valid = jnp.broadcast_to(jnp.arange(self.slots) < lengths[:, None, None], mask_shape)
        if self.masks_per_head:
            valid = valid & jax.random.bernoulli(mask_key, 0.7, mask_shape)
        positions = jnp.broadcast_to(jnp.arange(self.slots, dtype=jnp.int32), mask_shape)
        query_positions = self.slots + jnp.arange(self.rows, dtype=jnp.int32) % 8
        kwargs = {
            "valid": valid,
            "positions": positions if self.window else None,
            "query_positions": jnp.tile(query_positions, (self.batch, 1)) if self.window else None,
            "window": self.window,
            "scale": self.head_dim**-0.5,
            "softcap": self.softcap,
            "bias": jax.random.normal(bias_key, mask_shape) if self.bias else None,
            "return_logits": False,
        }
        return (q, self.keys.loader(k_key, *size), self.values.loader(v_key, *size)), kwargs

    def abstract(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Shapes only: (args, kwargs) of the op."""
        static = {name: getattr(self, name) for name in ("window", "softcap")}
        static |= {"scale": self.head_dim**-0.5, "return_logits": False}

        def arrays() -> tuple[tuple[Any, ...], dict[str, Any]]:
            args, kwargs = self.arguments()
            return args, {name: value for name, value in kwargs.items() if name not in static}

        args, kwargs = jax.eval_shape(arrays)
        return args, {**kwargs, **static}


INT8 = Format(bits=8)
KIVI_KEYS = Format(bits=4, block=32)
KIVI_VALUES = Format(bits=4, group=32)
KIVI2_KEYS = Format(bits=2, block=32)
KIVI2_VALUES = Format(bits=2, group=32)

SPECS = (
    DecodeSpec("dense", 2, 2, 4, 64, 32),
    DecodeSpec("one_slot", 1, 1, 1, 1, 32),
    DecodeSpec("ragged_bf16", 3, 2, 4, 1037, 32, Format(16), Format(16), lengths=(1037, 0, 5)),
    DecodeSpec("int8", 2, 2, 4, 1024, 32, INT8, INT8, lengths=(1000, 3)),
    DecodeSpec("int8_long", 1, 2, 4, 2500, 128, INT8, INT8, bias=True),
    DecodeSpec("int8_symmetric", 2, 1, 16, 100, 64, Format(8, symmetric=True), Format(8, symmetric=True)),
    DecodeSpec("kivi4", 2, 2, 4, 1024, 128, KIVI_KEYS, KIVI_VALUES, lengths=(1024, 500)),
    DecodeSpec("kivi2", 1, 2, 8, 96, 32, KIVI2_KEYS, KIVI2_VALUES, masks_per_head=True),
    DecodeSpec("kivi2_tail", 1, 1, 2, 4192, 64, KIVI2_KEYS, Format(2, group=16), window=700),
    DecodeSpec("straddling_groups", 1, 2, 3, 70, 96, Format(4, group=32), Format(2, group=48)),
    DecodeSpec("rotated_int4", 2, 2, 4, 640, 64, Format(4, rotated=True), Format(16), lengths=(640, 77)),
    DecodeSpec("rotated_block", 2, 2, 2, 256, 32, Format(8, block=32, rotated=True), INT8, softcap=10.0),
    DecodeSpec("shared_keys", 2, 4, 2, 333, 64, Format(8, shared=True), Format(16), bias=True),
    DecodeSpec("all_shared", 2, 4, 3, 333, 64, Format(16, shared=True), Format(8, shared=True), window=100),
    DecodeSpec("window_per_head", 2, 2, 4, 300, 32, window=64, masks_per_head=True, bias=True, lengths=(300, 280)),
    DecodeSpec("softcap", 2, 2, 4, 130, 128, softcap=3.0),
    DecodeSpec("query_chunk", 1, 2, 512, 700, 32, INT8, INT8, window=650),
    DecodeSpec("query_chunk_dense", 1, 2, 256, 900, 64),
    DecodeSpec("folded_int4", 2, 2, 4, 1024, 128, Format(4, fold=2), Format(4, fold=2), lengths=(1024, 300)),
    DecodeSpec("folded_int2", 1, 1, 8, 1024, 64, Format(2, group=32, fold=8), Format(8, symmetric=True, fold=2)),
    DecodeSpec("folded_kivi4", 2, 2, 4, 512, 64, Format(4, block=32, fold=4), Format(4, group=32, fold=4), window=300),
    DecodeSpec("empty", 2, 2, 4, 32, 32, INT8, INT8, lengths=(0, 0)),
)
