"""Stored formats and what they hold, element by element in NumPy from the formats' descriptions alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from pallas_kernels.loader import (
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
from pallas_kernels.rope import Rope
from pallas_kernels.rows import Rows


@dataclasses.dataclass(frozen=True)
class Stored:
    """A loader over random contents and the numbers they stand for, float64 [B, K or 1, S, H]."""

    loader: Loader
    x: np.ndarray


@dataclasses.dataclass(frozen=True)
class Size:
    """What a maker of `Stored` is asked for; `heads` is the head axis of the slots, `kv_heads` that of the leaves."""

    rng: np.random.Generator
    batch: int = 2
    heads: int = 3
    kv_heads: int = 3
    slots: int = 96
    dim: int = 32

    @property
    def lead(self) -> tuple[int, int]:
        return self.batch, self.heads

    def shared(self) -> Size:
        """One store for all heads."""
        return dataclasses.replace(self, heads=1)

    def channels(self, dim: int) -> Size:
        return dataclasses.replace(self, dim=dim)


def rounded(x: np.ndarray, dtype: Any = ml_dtypes.bfloat16) -> np.ndarray:
    return x.astype(dtype)


def packed(codes: np.ndarray, bits: int) -> np.ndarray:
    """Channel c of a slot: bits i·bits … of byte c mod P, i = c div P."""
    width = codes.shape[-1] * bits // 8
    out = np.zeros((*codes.shape[:-1], width), np.uint8)
    for channel in range(codes.shape[-1]):
        out[..., channel % width] |= (codes[..., channel] << (channel // width * bits)).astype(np.uint8)
    return out


def random_codes(size: Size, bits: int, fold: int = 1) -> tuple[np.ndarray, Rows, Rows | None]:
    codes = size.rng.integers(0, 2**bits, (*size.lead, size.slots, size.dim))
    if bits != 3:
        return codes, Rows.of(jnp.asarray(packed(codes, bits)), fold), None
    low, high = packed(codes % 4, 2), packed(codes // 4, 1)
    return codes, Rows.of(jnp.asarray(low), fold), Rows.of(jnp.asarray(high), 2 * fold if fold > 1 else 1)


def integer(bits: int, block: int = 1, groups: int = 1, symmetric: bool = False, fold: int = 1) -> Any:
    def make(size: Size) -> Stored:
        codes, low, high = random_codes(size, bits, fold)
        shape = (groups, *size.lead, size.slots) if block == 1 else (1, *size.lead, size.slots // block, size.dim)
        scale = rounded(size.rng.uniform(0.5, 2, shape) / 2**bits)
        zero = rounded(-size.rng.uniform(0, 2, shape))
        x = np.zeros((*size.lead, size.slots, size.dim))
        for s, h in np.ndindex(size.slots, size.dim):
            at = (h * groups // size.dim, ..., s) if block == 1 else (0, ..., s // block, h)
            step = scale[at].astype(np.float64)
            x[..., s, h] = codes[..., s, h] * step + (-(2 ** (bits - 1)) * step if symmetric else zero[at])
        parts = tuple(map(jnp.asarray, scale)), None if symmetric else tuple(map(jnp.asarray, zero))
        return Stored(IntegerLoader(low, *parts, bits=bits, size=block, high=high), x)

    return make


def codebook(bits: int, affine: bool = False, per_head: bool = True, fold: int = 1) -> Any:
    def make(size: Size) -> Stored:
        codes, low, high = random_codes(size, bits, fold)
        tables = size.kv_heads if per_head else 1
        table = np.sort(size.rng.normal(size=(tables, 2**bits)), axis=-1).astype(np.float32)
        x = np.zeros((size.batch, max(tables, size.heads), size.slots, size.dim))
        for b, k in np.ndindex(*x.shape[:2]):
            x[b, k] = table[k % tables][codes[b, k % size.heads]]
        scale = offset = None
        if affine:
            scale, offset = (rounded(size.rng.uniform(0.5, 2, (*size.lead, size.slots))) for _ in range(2))
            x = x * scale.astype(np.float64)[..., None] + offset.astype(np.float64)[..., None]
            scale, offset = jnp.asarray(scale), jnp.asarray(offset)
        return Stored(CodebookLoader(low, jnp.asarray(table), bits, high, scale, offset), x)

    return make


def float8(format: str, scaled: bool = False, fold: int = 1) -> Any:
    kind = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}[format]

    def make(size: Size) -> Stored:
        # All finite numbers of the format, small and subnormal ones included.
        every = np.arange(256, dtype=np.uint8).view(kind).astype(np.float64)
        some = np.flatnonzero(np.abs(every) < 64)
        codes = size.rng.choice(some, (*size.lead, size.slots, size.dim)).astype(np.uint8)
        x = every[codes]
        scale = None
        if scaled:
            by = rounded(size.rng.uniform(0.01, 0.1, (*size.lead, size.slots)))
            x, scale = x * by.astype(np.float64)[..., None], jnp.asarray(by)
        return Stored(Float8Loader(Rows.of(jnp.asarray(codes), fold), format, scale), x)  # type: ignore[arg-type]

    return make


def fixed(bits: int, fold: int = 1) -> Any:
    def make(size: Size) -> Stored:
        codes, low, high = random_codes(size, bits, fold)
        return Stored(FixedLoader(low, bits, high), codes - 2.0 ** (bits - 1))

    return make


def dense(dtype: Any = np.float32) -> Any:
    def make(size: Size) -> Stored:
        x = rounded(size.rng.normal(size=(*size.lead, size.slots, size.dim)), dtype)
        return Stored(DenseLoader(jnp.asarray(x)), x.astype(np.float64))

    return make


def scaled(inner: Any, offset: bool = False, by_row: bool = False) -> Any:
    def make(size: Size) -> Stored:
        part = inner(size)
        shape = (size.batch,) * by_row + (size.kv_heads, size.dim)
        scale, shift = (size.rng.normal(size=shape).astype(np.float32) for _ in range(2))
        x = part.x * scale[..., None, :] + (shift[..., None, :] if offset else 0)
        return Stored(ScaledLoader(part.loader, jnp.asarray(scale), jnp.asarray(shift) if offset else None), x)

    return make


def subset(inner: Any, width: int = 32, by_row: bool = False) -> Any:
    """`inner` holds half of the channels."""

    def make(size: Size) -> Stored:
        part = inner(size.channels(width // 2))
        lead = (size.batch,) * by_row + (size.kv_heads,)
        index = np.sort(size.rng.random((*lead, width)).argsort(axis=-1)[..., : width // 2], axis=-1)
        x = np.zeros((size.batch, size.kv_heads, size.slots, width))
        for b, k in np.ndindex(*x.shape[:2]):
            x[b, k][:, index[b, k] if by_row else index[k]] = part.x[b, k % part.x.shape[1]]
        return Stored(SubsetLoader(part.loader, jnp.asarray(index, jnp.int32), width), x)

    return make


def low_rank(inner: Any, rank: int = 8, joint: bool = True) -> Any:
    def make(size: Size) -> Stored:
        part = inner((size.shared() if joint else size).channels(rank))
        up = (size.rng.normal(size=(size.kv_heads, rank, size.dim)) / rank**0.5).astype(np.float32)
        x = np.stack([part.x[:, k % part.x.shape[1]] @ up[k] for k in range(size.kv_heads)], axis=1)
        return Stored(LowRankLoader(part.loader, jnp.asarray(up)), x)

    return make


def rotated(inner: Any) -> Any:
    def make(size: Size) -> Stored:
        part = inner(size)
        half = size.dim // 2
        frequency = 10_000.0 ** -(np.arange(half) / half)
        positions = size.rng.permutation(2 * size.slots)[: size.slots]
        x = np.zeros(part.x.shape)
        for s, h in np.ndindex(size.slots, half):
            turned = (part.x[..., s, h] + 1j * part.x[..., s, h + half]) * np.exp(1j * positions[s] * frequency[h])
            x[..., s, h], x[..., s, h + half] = turned.real, turned.imag
        at = jnp.broadcast_to(jnp.asarray(positions, jnp.int32), (size.batch, 1, size.slots))
        rope = Rope(jnp.asarray(frequency, jnp.float32), jnp.float32(1.0))
        return Stored(RotatedLoader(part.loader, at, rope), x)

    return make


def outlier(inner: Any, capacity: int = 3, block: int = 1) -> Any:
    def make(size: Size) -> Stored:
        part = inner(size)
        lead, blocks = (size.batch, size.heads), size.slots // block
        index = size.rng.integers(0, block * size.dim, (*lead, blocks, capacity))
        value = rounded(3 * size.rng.normal(size=index.shape))
        value[..., capacity - 1] *= size.rng.random((*lead, blocks)) < 0.5  # some pairs are not in use
        x = np.array(np.broadcast_to(part.x, (size.batch, max(lead[1], part.x.shape[1]), *part.x.shape[2:])))
        for b, k, m, c in np.ndindex(*index.shape):
            slot, channel = divmod(int(index[b, k, m, c]), size.dim)
            heads = [k] if size.heads > 1 else slice(None)
            x[b, heads, m * block + slot, channel] += float(value[b, k, m, c])
        kind = np.uint8 if block == 1 else np.int16
        parts = [index.astype(kind), value]
        if block == 1:
            pairs = [tuple(jnp.asarray(a[..., c]) for c in range(capacity)) for a in parts]
        else:
            pairs = [(jnp.asarray(a),) for a in parts]
        return Stored(OutlierLoader(part.loader, pairs[0], pairs[1], block), x)

    return make


def joint_outlier(inner: Any, capacity: int = 4, block: int = 1) -> Any:
    """Pairs that all heads share, with channels counted through the heads."""

    def make(size: Size) -> Stored:
        part, width = inner(size), size.kv_heads * size.dim
        index = size.rng.integers(0, block * width, (size.batch, 1, size.slots // block, capacity))
        value = rounded(3 * size.rng.normal(size=index.shape))
        x = np.array(np.broadcast_to(part.x, (size.batch, size.kv_heads, size.slots, size.dim)))
        for b, m, c in np.ndindex(size.batch, *index.shape[2:]):
            slot, channel = divmod(int(index[b, 0, m, c]), width)
            x[b, channel // size.dim, m * block + slot, channel % size.dim] += float(value[b, 0, m, c])
        arrays = [index.astype(np.uint16), value]
        pairs = [
            tuple(jnp.asarray(a[..., c]) for c in range(capacity)) if block == 1 else (jnp.asarray(a),) for a in arrays
        ]
        first = jnp.arange(size.kv_heads, dtype=jnp.int32) * size.dim
        return Stored(OutlierLoader(part.loader, *pairs, block, first), x)

    return make


def concat(*parts: tuple[Any, int]) -> Any:
    """Makers with how many channels each makes."""

    def make(size: Size) -> Stored:
        made = [part(size.channels(dim)) for part, dim in parts]
        heads = max(m.x.shape[1] for m in made)
        x = np.concatenate([np.broadcast_to(m.x, (size.batch, heads, *m.x.shape[2:])) for m in made], axis=-1)
        return Stored(ConcatLoader(tuple(m.loader for m in made)), x)

    return make


def shared(inner: Any) -> Any:
    """One store for all heads."""
    return lambda size: inner(size.shared())


KVQUANT = scaled(outlier(codebook(3)), offset=True)
MLA = concat((low_rank(dense(ml_dtypes.bfloat16)), 32), (shared(dense()), 16))

FORMATS: dict[str, Callable[[Size], Stored]] = {
    "int3": integer(3),
    "int3-groups": integer(3, groups=2),
    "int3-channel": integer(3, block=32),
    "codebook2": codebook(2),
    "codebook3": codebook(3, per_head=False),
    "codebook4": codebook(4),
    "codebook4-affine": codebook(4, affine=True, per_head=False),
    "codebook2-affine-shared": shared(codebook(2, affine=True)),
    "codebook1-affine": codebook(1, affine=True),
    "fixed8": fixed(8),
    "scaled-fixed3": scaled(fixed(3), by_row=True),
    "subset": subset(integer(4)),
    "subset-by-row-shared": subset(shared(integer(8)), by_row=True),
    "e4m3": float8("e4m3"),
    "e4m3-scaled": float8("e4m3", scaled=True),
    "e5m2-scaled-shared": shared(float8("e5m2", scaled=True)),
    "scaled-int8": scaled(integer(8, symmetric=True)),
    "scaled-e4m3-shared": scaled(shared(float8("e4m3"))),
    "scaled-by-row": scaled(integer(4), offset=True, by_row=True),
    "outlier-block": outlier(integer(4, block=32), capacity=5, block=16),
    "outlier-shared": outlier(shared(integer(4))),
    "outlier-joint": joint_outlier(integer(4)),
    "outlier-joint-block": joint_outlier(integer(4, block=32), block=16),
    "kvquant-layer-keys": scaled(joint_outlier(codebook(3)), offset=True),
    "kvquant-keys": KVQUANT,
    "kvquant-keys-rotated": rotated(KVQUANT),
    "kvquant-values": outlier(codebook(2, affine=True, per_head=False), capacity=1),
    "low-rank": low_rank(dense(ml_dtypes.bfloat16)),
    "low-rank-int4-channel": low_rank(integer(4, block=32)),
    "low-rank-per-head": low_rank(dense(), joint=False),
    "low-rank-rotated": rotated(low_rank(integer(4))),
    "low-rank-of-scaled": low_rank(lambda size: scaled(integer(8), offset=True)(dataclasses.replace(size, kv_heads=1))),
    "mla-keys": MLA,
    "concat-of-blocks": concat((integer(4, block=32), 16), (float8("e4m3"), 8), (scaled(dense(), offset=True), 8)),
}
