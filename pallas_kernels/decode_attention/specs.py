"""Real workloads of `decode_attention`, read by the tests, benchmarks and tuners."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from pallas_kernels.loader import (
    CodebookLoader,
    ConcatLoader,
    DenseLoader,
    Float8Loader,
    IntegerLoader,
    Loader,
    LowRankLoader,
    OutlierLoader,
    RotatedLoader,
    ScaledLoader,
)
from pallas_kernels.packing import LOW_BITS
from pallas_kernels.pages import Pages
from pallas_kernels.rope import Rope
from pallas_kernels.rows import Rows


@dataclasses.dataclass(frozen=True)
class Format:
    """How keys or values are stored.

    Attributes:
      bits: 32 and 16 are float32 and bfloat16; 8, 4, 3 and 2 are packed codes.
      block: slots per block of codes; scales are per slot at 1 and per block above.
      group: channels that share a scale where scales are per slot; None means all of a head.
      symmetric: codes without a zero point.
      shared: one store for all kv heads.
      rotated: rotary embedding is applied when the keys are read.
      fold: slots that share a row of codes.
      code: what a code of at most 8 bits stands for.
      outliers: elements of a slot that are also stored by themselves.
      scaled: each channel of a head has a scale of its own.
      rank: channels of the latents that are stored in place of those of a head; None: none.
      rotary: channels, in bfloat16, behind those that all else is said of.
    """

    bits: int = 32
    block: int = 1
    group: int | None = None
    symmetric: bool = False
    shared: bool = False
    rotated: bool = False
    fold: int = 1
    code: Literal["integer", "float8", "codebook"] = "integer"
    outliers: int = 0
    scaled: bool = False
    rank: int | None = None
    rotary: int = 0

    def loader(self, key: jax.Array, batch: int, heads: int, slots: int, dim: int) -> Loader:
        """Random contents of `dim` channels, besides rotary ones; `slots` must be a multiple of `block`."""
        lead, stored = (batch, 1 if self.shared else heads), self.rank or dim
        found = self._stored(key, lead, slots, stored)
        index_key, value_key, scale_key, up_key, rotary_key = jax.random.split(jax.random.fold_in(key, 1), 5)
        if self.outliers:
            shape = (self.outliers, *lead, slots)
            index = jax.random.randint(index_key, shape, 0, stored).astype(jnp.uint16)
            value = jax.random.normal(value_key, shape, jnp.bfloat16)
            found = OutlierLoader(found, tuple(index), tuple(value), size=1)
        if self.scaled:
            found = ScaledLoader(found, jax.random.uniform(scale_key, (heads, stored), minval=0.5, maxval=2.0))
        if self.rank:
            found = LowRankLoader(found, jax.random.normal(up_key, (heads, stored, dim), jnp.bfloat16) * stored**-0.5)
        if self.rotary:
            rotary = jax.random.normal(rotary_key, (*lead, slots, self.rotary), jnp.bfloat16)
            found = ConcatLoader((found, DenseLoader(rotary)))
        return self._rotated(found, batch) if self.rotated else found

    def _rotated(self, inner: Loader, batch: int) -> Loader:
        half, slots = inner.head_dim // 2, inner.count
        inv_freq = 10_000.0 ** -(jnp.arange(half) / half)
        positions = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32), (batch, 1, slots))
        return RotatedLoader(inner, positions, Rope(inv_freq, jnp.float32(1.0)))

    def _stored(self, key: jax.Array, lead: tuple[int, int], slots: int, dim: int) -> Loader:
        if self.bits > 8:
            dtype = {32: jnp.float32, 16: jnp.bfloat16}[self.bits]
            return DenseLoader(jax.random.normal(key, (*lead, slots, dim), dtype))
        code_key, scale_key, zero_key = jax.random.split(key, 3)
        if self.code == "float8":
            number = jax.random.randint(code_key, (*lead, slots, dim), 0, 254)
            bits = number // 127 * 128 + number % 127  # all but 127 and 255, which are NaN
            return Float8Loader(Rows.of(bits.astype(jnp.uint8), self.fold), "e4m3")
        codes = self._codes(code_key, lead, slots, dim * LOW_BITS[self.bits] // 8, self.fold)
        high = None
        if self.bits == 3:
            high_key, fold = jax.random.fold_in(code_key, 1), 2 * self.fold if self.fold > 1 else 1
            high = self._codes(high_key, lead, slots, dim // 8, fold)
        if self.code == "codebook":
            table = jnp.sort(jax.random.normal(zero_key, (lead[1], 2**self.bits)), axis=-1)
            return CodebookLoader(codes, table, self.bits, high)
        levels = 2**self.bits - 1
        groups = dim // (self.group or dim) if self.block == 1 else 1
        shape = (groups, *lead, slots) if self.block == 1 else (1, *lead, slots // self.block, dim)
        scale = (jax.random.uniform(scale_key, shape, minval=1.0, maxval=4.0) / levels).astype(jnp.bfloat16)
        zero = None if self.symmetric else tuple(-jax.random.uniform(zero_key, shape, maxval=3.0).astype(jnp.bfloat16))
        return IntegerLoader(codes, tuple(scale), zero, self.bits, self.block, high)

    @staticmethod
    def _codes(key: jax.Array, lead: tuple[int, int], slots: int, width: int, fold: int) -> Rows:
        return Rows.of(jax.random.bits(key, (*lead, slots, width), jnp.uint8), fold)


@dataclasses.dataclass(frozen=True)
class DecodeSpec:
    """One workload; letters as in the glossary.

    Attributes:
      masks_per_head: what is slot-wise differs between kv heads.
      lengths: valid slots of each row; None: all.
      holes: share of slots that are not valid besides.
      page: slots per page; None: slots lie in order.
      pool: where pages lie: a row and kv head has a pool of twice as many as it reads, or there is one pool for all.
    """

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
    holes: float = 0.0
    page: int | None = None
    pool: Literal["own", "joint"] = "own"

    def arguments(self, seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Random (args, kwargs) of the op."""
        q_key, k_key, v_key, mask_key, bias_key, page_key = jax.random.split(jax.random.key(seed), 6)
        q = jax.random.normal(q_key, (self.batch, self.kv_heads, self.rows, self.head_dim + self.keys.rotary))
        size, pages = (self.batch, self.kv_heads, self.slots, self.head_dim), None
        if self.page is not None:
            size, pages = self._paged(page_key)
        mask_shape = (self.batch, self.kv_heads if self.masks_per_head else 1, self.slots)
        positions = jnp.broadcast_to(jnp.arange(self.slots, dtype=jnp.int32), mask_shape)
        query_positions = self.slots + jnp.arange(self.rows, dtype=jnp.int32) % 8
        kwargs = {
            "lengths": None if self.lengths is None else jnp.asarray(self.lengths, jnp.int32)[:, None],
            "valid": jax.random.bernoulli(mask_key, 1 - self.holes, mask_shape) if self.holes else None,
            "pages": pages,
            "positions": positions if self.window else None,
            "query_positions": jnp.tile(query_positions, (self.batch, 1)) if self.window else None,
            "window": self.window,
            "scale": self.head_dim**-0.5,
            "softcap": self.softcap,
            "bias": jax.random.normal(bias_key, mask_shape) if self.bias else None,
            "return_logits": False,
        }
        return (q, self.keys.loader(k_key, *size), self.values.loader(v_key, *size)), kwargs

    def _paged(self, key: jax.Array) -> tuple[tuple[int, int, int, int], Pages]:
        """The pool's batch, kv heads, slots and channels, and which pages are read; none is read twice."""
        assert self.page is not None
        batch, heads, each = self.batch, self.kv_heads, self.slots // self.page
        if self.pool == "joint":
            table = jax.random.permutation(key, batch * heads * each).reshape(batch, heads, each)
            return (1, 1, batch * heads * self.slots, self.head_dim), Pages(table.astype(jnp.int32), self.page)
        keys = jax.random.split(key, batch * heads)
        table = jax.vmap(lambda k: jax.random.permutation(k, 2 * each)[:each])(keys).reshape(batch, heads, each)
        return (batch, heads, 2 * self.slots, self.head_dim), Pages(table.astype(jnp.int32), self.page)

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
    DecodeSpec("kivi2", 1, 2, 8, 96, 32, KIVI2_KEYS, KIVI2_VALUES, masks_per_head=True, holes=0.3),
    DecodeSpec("kivi2_tail", 1, 1, 2, 4192, 64, KIVI2_KEYS, Format(2, group=16), window=700),
    DecodeSpec("straddling_groups", 1, 2, 3, 70, 96, Format(4, group=32), Format(2, group=48)),
    DecodeSpec("rotated_int4", 2, 2, 4, 640, 64, Format(4, rotated=True), Format(16), lengths=(640, 77)),
    DecodeSpec("rotated_block", 2, 2, 2, 256, 32, Format(8, block=32, rotated=True), INT8, softcap=10.0),
    DecodeSpec("shared_keys", 2, 4, 2, 333, 64, Format(8, shared=True), Format(16), bias=True),
    DecodeSpec("all_shared", 2, 4, 3, 333, 64, Format(16, shared=True), Format(8, shared=True), window=100),
    DecodeSpec(
        "window_per_head", 2, 2, 4, 300, 32, window=64, masks_per_head=True, holes=0.3, bias=True, lengths=(300, 280)
    ),
    DecodeSpec("softcap", 2, 2, 4, 130, 128, softcap=3.0),
    DecodeSpec("query_chunk", 1, 2, 512, 700, 32, INT8, INT8, window=650),
    DecodeSpec("query_chunk_dense", 1, 2, 256, 900, 64),
    DecodeSpec("folded_int4", 2, 2, 4, 1024, 128, Format(4, fold=2), Format(4, fold=2), lengths=(1024, 300)),
    DecodeSpec("folded_int2", 1, 1, 8, 1024, 64, Format(2, group=32, fold=8), Format(8, symmetric=True, fold=2)),
    DecodeSpec("folded_kivi4", 2, 2, 4, 512, 64, Format(4, block=32, fold=4), Format(4, group=32, fold=4), window=300),
    DecodeSpec("empty", 2, 2, 4, 32, 32, INT8, INT8, lengths=(0, 0)),
    DecodeSpec("holes", 2, 2, 4, 300, 64, Format(16), Format(16), lengths=(300, 40), holes=0.4),
    DecodeSpec("packed_pool", 2, 2, 4, 512, 64, Format(8, fold=2), INT8, lengths=(400, 0), page=256, pool="joint"),
    DecodeSpec("chosen_pages", 2, 2, 4, 256, 128, Format(4, fold=2), Format(4, fold=2), page=256, lengths=(200, 256)),
)

INT4 = Format(4, fold=2)
INT2 = Format(2, fold=4)
_LONG = (2, 8, 4, 4096, 128)
_WIDE = (2, 8, 8, 4096, 128)
_SHORT = (8, 8, 8, 512, 128)
_LATENT = Format(16, shared=True, rank=512)

HARDWARE = (
    DecodeSpec("bf16_g4", *_LONG, Format(16), Format(16)),
    DecodeSpec("bf16_g8", *_WIDE, Format(16), Format(16)),
    DecodeSpec("int8_g4", *_LONG, INT8, INT8),
    DecodeSpec("int8_g8", *_WIDE, INT8, INT8),
    DecodeSpec("int4_g4", *_LONG, INT4, INT4),
    DecodeSpec("int4_g8", *_WIDE, INT4, INT4),
    DecodeSpec("int2_g4", *_LONG, INT2, INT2),
    DecodeSpec("int2_g8", *_WIDE, INT2, INT2),
    DecodeSpec("int4_g8_h64", 2, 8, 8, 4096, 64, Format(4, fold=4), Format(4, fold=4)),
    DecodeSpec("kivi4_g4", *_LONG, Format(4, block=32, fold=2), Format(4, group=32, fold=2)),
    DecodeSpec("kivi2_g4", *_LONG, Format(2, block=32, fold=4), Format(2, group=32, fold=4)),
    DecodeSpec("rotated_int4_g4", *_LONG, Format(4, fold=2, rotated=True), INT4),
    DecodeSpec("ragged_int8_s32k", 4, 8, 4, 32768, 128, INT8, INT8, lengths=(32768, 100, 9000, 1)),
    DecodeSpec("window_int8_g8", *_WIDE, INT8, INT8, window=1024),
    DecodeSpec("chosen_pages_int4", *_LONG, INT4, INT4, page=512),
    DecodeSpec("packed_pool_int8", *_LONG, INT8, INT8, page=512, pool="joint", lengths=(4096, 1000)),
    DecodeSpec("one_joint_head_bf16", 8, 16, 1, 4096, 128, Format(16, shared=True), Format(16, shared=True)),
    DecodeSpec("two_heads_int4", 8, 2, 8, 4096, 128, INT4, INT4),
    DecodeSpec("int8_g8_s512", *_SHORT, INT8, INT8),
    DecodeSpec("int4_g8_s512", *_SHORT, INT4, INT4),
    DecodeSpec("int4_g8_s512_alone", 1, 8, 8, 512, 128, INT4, INT4),
    DecodeSpec("int3_g4", *_LONG, Format(3, fold=4), Format(3, fold=4)),
    DecodeSpec("float8_g4", *_LONG, Format(8, code="float8"), Format(8, code="float8")),
    DecodeSpec("codebook4_g4", *_LONG, Format(4, fold=2, code="codebook"), Format(4, fold=2, code="codebook")),
    DecodeSpec("outliers_int4_g4", *_LONG, Format(4, fold=2, outliers=2), INT4),
    DecodeSpec("scaled_int8_g4", *_LONG, Format(8, scaled=True), Format(8, scaled=True)),
    DecodeSpec("latent_values_g4", *_LONG, Format(16), Format(16, shared=True, rank=256)),
    DecodeSpec("latent_keys_rotated_g4", *_LONG, Format(16, shared=True, rank=256, rotated=True), Format(16)),
    DecodeSpec("mla", 8, 16, 1, 4096, 128, Format(16, shared=True, rank=512, rotary=64), _LATENT),
)
"""Workloads of real size, for the table of compiled kernels."""
