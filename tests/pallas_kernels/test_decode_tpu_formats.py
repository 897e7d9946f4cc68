"""Formats that the TPU kernel of decode attention decodes itself, interpreted as in `test_decode_tpu`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from pallas_kernels import decode_attention
from pallas_kernels.compat import TpuCore, interpreted
from pallas_kernels.decode_attention import pallas_tpu, reference
from pallas_kernels.decode_attention.pallas_tpu.coded import Float8
from pallas_kernels.decode_attention.pallas_tpu.reader import Operand
from pallas_kernels.decode_attention.specs import DecodeSpec, Format
from pallas_kernels.loader import (
    BlockLoader,
    CodebookLoader,
    ConcatLoader,
    DenseLoader,
    FixedLoader,
    Float8Loader,
    IntegerLoader,
    Loader,
    LowRankLoader,
    OutlierLoader,
    RotatedLoader,
    ScaledLoader,
    SubsetLoader,
)
from pallas_kernels.packing import pack, split
from pallas_kernels.pages import Pages
from pallas_kernels.rope import Rope
from pallas_kernels.rows import Rows
from pallas_kernels.testing import assert_close
from tests.thin import thinned

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
INTEGERS, FLOATS = TpuCore(), TpuCore(multiplies_int8=False, vector_memory=1 << 24)
BATCH, HEADS, DIM = 1, 2, 128


@dataclasses.dataclass(frozen=True)
class Contents:
    """Random loaders of one cache, by seed."""

    slots: int
    dim: int = DIM
    heads: int = HEADS
    seed: int = 0

    def normal(self, *shape: int, seed: int = 0) -> jax.Array:
        return jax.random.normal(jax.random.key(100 * self.seed + seed), shape)

    def per_slot(self, seed: int) -> jax.Array:
        return (0.5 + jnp.abs(self.normal(BATCH, self.heads, self.slots, seed=seed))).astype(jnp.bfloat16)

    def packed(self, bits: int, fold: int) -> tuple[Rows, Rows | None]:
        shape = (BATCH, self.heads, self.slots, self.dim)
        low, high = split(jax.random.randint(jax.random.key(self.seed), shape, 0, 2**bits), bits)
        return Rows.of(low, fold), None if high is None else Rows.of(high, 2 * fold)

    def codebook(self, bits: int, fold: int, *, scale: bool = False, offset: bool = False) -> Loader:
        codes, high = self.packed(bits, fold)
        table = self.normal(self.heads, 2**bits, seed=1)
        factors = (self.per_slot(2) if scale else None, self.per_slot(3) if offset else None)
        return CodebookLoader(codes, table, bits, high, *factors)

    def fixed(self, bits: int, fold: int) -> Loader:
        codes, high = self.packed(bits, fold)
        return ScaledLoader(FixedLoader(codes, bits, high), self.normal(self.heads, self.dim) * 2.0**-bits)

    def float8(self, kind: Any, fold: int = 1, *, scale: bool = False) -> Loader:
        bits = jax.random.randint(jax.random.key(self.seed), (BATCH, self.heads, self.slots, self.dim), 0, 0x50)
        sign = jax.random.bernoulli(jax.random.key(self.seed + 1), shape=bits.shape) * 0x80
        return Float8Loader(Rows.of((bits + sign).astype(jnp.uint8), fold), kind, self.per_slot(2) if scale else None)

    def integer(self, bits: int, fold: int, *, groups: int = 1, symmetric: bool = False) -> Loader:
        codes, high = self.packed(bits, fold)
        scale = tuple(self.per_slot(2 + i) * 2.0**-bits for i in range(groups))
        zero = None if symmetric else tuple(-self.per_slot(9 + i) for i in range(groups))
        return IntegerLoader(codes, scale, zero, bits, 1, high)

    def outliers(self, inner: Loader, count: int, *, shared: bool = False) -> Loader:
        lead, many = (BATCH, 1 if shared else self.heads), self.heads if shared else 1
        keys = jax.random.split(jax.random.key(self.seed + 7), count)
        index = [jax.random.randint(k, (*lead, self.slots), 0, many * self.dim).astype(jnp.uint16) for k in keys]
        value = [jax.random.normal(k, (*lead, self.slots), jnp.bfloat16) * 3 for k in keys]
        first = jnp.arange(self.heads, dtype=jnp.int32) * self.dim if shared else None
        return OutlierLoader(inner, tuple(index), tuple(value), 1, first)

    def rotated(self, inner: Loader) -> Loader:
        inv_freq = 10_000.0 ** -(jnp.arange(inner.head_dim // 2) * 2 / inner.head_dim)
        positions = jnp.broadcast_to(jnp.arange(self.slots, dtype=jnp.int32) * 3, (BATCH, 1, self.slots))
        return RotatedLoader(inner, positions, Rope(inv_freq, jnp.float32(1.1)))

    def scaled(self, inner: Loader) -> Loader:
        return ScaledLoader(inner, self.normal(self.heads, self.dim, seed=4), self.normal(self.heads, self.dim, seed=5))

    def projected(self, rank: int, dtype: Any) -> Loader:
        latents = DenseLoader(self.normal(BATCH, 1, self.slots, rank, seed=6).astype(dtype))
        return LowRankLoader(latents, (self.normal(self.heads, rank, self.dim) * rank**-0.5).astype(dtype))

    def dense(self) -> Loader:
        return DenseLoader(self.normal(BATCH, self.heads, self.slots, self.dim, seed=8).astype(jnp.bfloat16))


A, B = Contents, functools.partial(Contents, seed=1)


def case(name: str, core: TpuCore, keys: Callable[[], Loader], values: Callable[[], Loader]) -> Any:
    return pytest.param(core, keys, values, id=name)


PAIRS = (
    case("codebook4", INTEGERS, lambda: A(512).codebook(4, 2), lambda: B(512).codebook(4, 2, scale=True, offset=True)),
    case("codebook3", INTEGERS, lambda: A(1024).codebook(3, 4, scale=True), lambda: B(1024).codebook(3, 4)),
    case("codebook2_1", FLOATS, lambda: A(1024).codebook(1, 8, scale=True), lambda: B(1024).codebook(2, 4, scale=True)),
    case("float8", INTEGERS, lambda: A(300).float8("e4m3", scale=True), lambda: B(300).float8("e4m3")),
    case(
        "e5m2", FLOATS, lambda: A(256, dim=64).float8("e5m2", 2), lambda: B(256, dim=64).float8("e5m2", 2, scale=True)
    ),
    case("int3", INTEGERS, lambda: A(1024).integer(3, 4), lambda: B(1024).integer(3, 4, symmetric=True)),
    case("int3_floats", FLOATS, lambda: A(1024).integer(3, 4, symmetric=True), lambda: B(1024).integer(3, 4, groups=4)),
    case("fixed", INTEGERS, lambda: A(512).fixed(4, 2), lambda: B(512).fixed(8, 1)),
    case("fixed3", FLOATS, lambda: A(1024).fixed(3, 4), lambda: B(1024).fixed(2, 4)),
    case(
        "outliers",
        INTEGERS,
        lambda: A(512).outliers(A(512).integer(4, 2), 2),
        lambda: B(512).outliers(B(512).codebook(4, 2, scale=True), 1, shared=True),
    ),
    case(
        "rotated_codebook",
        INTEGERS,
        lambda: A(512).rotated(A(512).scaled(A(512).outliers(A(512).codebook(4, 2), 1))),
        lambda: B(512).dense(),
    ),
    case("rotated_int3", FLOATS, lambda: A(1024).rotated(A(1024).integer(3, 4)), lambda: B(1024).dense()),
    case("rotated_float8", INTEGERS, lambda: A(256).rotated(A(256).float8("e4m3", scale=True)), lambda: B(256).dense()),
    case("latents", INTEGERS, lambda: A(256).rotated(A(256).projected(64, jnp.bfloat16)), lambda: B(256).dense()),
    case("latents_f32", FLOATS, lambda: A(200).rotated(A(200).projected(32, jnp.float32)), lambda: B(200).dense()),
)


def run(keys: Loader, values: Loader, core: TpuCore, queries: int = 4, **more: Any) -> tuple[Any, Any]:
    """(result of the interpreted kernel, result of the reference)."""
    q = jax.random.normal(jax.random.key(5), (BATCH, HEADS, queries, keys.head_dim))
    spec = DecodeSpec("options", BATCH, HEADS, queries, keys.count, keys.head_dim)
    options = spec.arguments()[1] | {"lengths": jnp.full((BATCH, 1), keys.count - 90, jnp.int32)} | more

    def jitted(forward: Any, **static: Any) -> Any:
        return jax.jit(lambda q, k, v: forward(q, k, v, **options, **static), compiler_options=QUICK)(q, keys, values)

    with interpreted():
        got = jax.block_until_ready(jitted(pallas_tpu.forward, core=core))
    return got, jitted(reference.run)


@pytest.mark.parametrize(("core", "keys", "values"), thinned(PAIRS, 4))
def test_equals_the_reference(core: TpuCore, keys: Callable[[], Loader], values: Callable[[], Loader]) -> None:
    assert_close(*run(keys(), values(), core))


@pytest.mark.parametrize("rotary", [64, 128])  # the narrow one with slots along the lanes
def test_latents_with_a_shared_rotary_part_are_read_once_for_all_heads(rotary: int) -> None:
    latent = Format(16, shared=True, rank=128)
    spec = DecodeSpec("mla", 2, 4, 2, 256, 64, dataclasses.replace(latent, rotary=rotary), latent, lengths=(256, 100))
    (q, keys, values), options = spec.arguments()
    with interpreted():
        got = pallas_tpu.forward(q, keys, values, **options, core=INTEGERS)
    assert_close(got, reference.run(q, keys, values, **options))


@pytest.mark.parametrize("kind", ["e4m3", "e5m2"])
def test_every_float8_is_made_of_its_bits(kind: Any) -> None:
    """Subnormal numbers, infinities and what is not a number among them."""
    mantissa, special = {"e4m3": (3, 0x7F), "e5m2": (2, 0x7C)}[kind]
    codes = jnp.broadcast_to(jnp.arange(256, dtype=jnp.uint8).reshape(1, 1, 2, 128), (64, 1, 2, 128))
    loader = Float8Loader(Rows.of(codes.reshape(1, 1, 128, 128)), kind)
    form = Float8(jnp.bfloat16, 128, mantissa=mantissa, special=special)

    def kernel(ref: Any, out: Any) -> None:
        out[...] = form.numbers(Operand(loader.with_slots((Rows(ref, 128), None))), 0, 0, 0)[0]

    with interpreted():
        got = pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct((128, 128), jnp.float32))(loader.codes.data)
    np.testing.assert_array_equal(got, loader.decode()[0, 0])


def test_invalid_slots_may_hold_any_bits() -> None:
    """Values that are not numbers, and factors that are not, in slots that are not valid."""
    keys, values = A(256).float8("e4m3", scale=True), B(256).float8("e4m3", scale=True)
    unused = jnp.arange(256) >= 166

    def poisoned(loader: Any) -> Loader:
        bits = jnp.where(unused[:, None], jnp.uint8(0xFF), loader.codes.data)
        return Float8Loader(Rows(bits, DIM), loader.format, jnp.where(unused, jnp.nan, loader.scale))

    got, _ = run(poisoned(keys), poisoned(values), INTEGERS)
    assert_close(got, run(keys, values, INTEGERS)[1])


def test_what_cannot_be_read_has_a_reason() -> None:
    dense, slots = A(256).dense(), 256
    subset = SubsetLoader(dense, jnp.arange(DIM, dtype=jnp.int32)[None], 2 * DIM)
    unfolded = pack(jnp.zeros((1, 2, slots, DIM), jnp.uint8), 4)
    for keys, reason in (
        (BlockLoader(dense.slots, lambda x: x, DIM, 1), "no reader of BlockLoader"),
        (A(256).rotated(A(256).rotated(dense)), "RotatedLoader inside another format"),
        (A(256).rotated(subset), "no reader of SubsetLoader"),
        (ConcatLoader((dense, A(256).float8("e4m3"))), "channels in several formats"),
        (CodebookLoader(Rows.of(unfolded), jnp.zeros((1, 16)), 4), "fold them"),
    ):
        q = jnp.zeros((BATCH, HEADS, 1, keys.head_dim))
        with pytest.raises(NotImplementedError, match=reason):
            decode_attention(q, keys, dense, scale=1.0, implementation="pallas_tpu")


def test_pages_of_narrow_arrays_have_a_reason() -> None:
    """A block of an array with slots along the lanes is cut there, and pages are not whole tiles of lanes."""
    values = A(256).dense()
    keys = ConcatLoader((values, Contents(256, dim=64).dense()))
    pages = Pages(jnp.zeros((BATCH, 1, 2), jnp.int32), 128)
    q = jnp.zeros((BATCH, HEADS, 1, keys.head_dim))
    with pytest.raises(NotImplementedError, match="pages of an array whose channels do not fill the lanes"):
        decode_attention(q, keys, values, pages=pages, scale=1.0, implementation="pallas_tpu")
