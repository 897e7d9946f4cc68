"""Which loader has which reader."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from pallas_kernels.decode_attention.pallas_tpu.coded import Codebook, Fixed, Float8, Integer
from pallas_kernels.decode_attention.pallas_tpu.composed import Corrected, Joined, Projected, Scaled
from pallas_kernels.decode_attention.pallas_tpu.decoded import Blockwise, Rotated
from pallas_kernels.decode_attention.pallas_tpu.reader import Reader
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
)
from pallas_kernels.packing import LOW_BITS
from pallas_kernels.rows import LANES


def _dense(loader: DenseLoader, integers: bool) -> Reader:
    if loader.x.dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(f"no matrix unit for {loader.x.dtype}")
    return Reader(loader.x.dtype, loader.head_dim)


def _shape(loader: Any) -> tuple[int, int, int]:
    """Channels, fold and planes of packed codes.

    Raises:
      NotImplementedError: rows do not fill vector registers.
    """
    codes, planes = loader.codes, 8 // LOW_BITS[loader.bits]
    width, fold = codes.width, codes.fold
    if planes > 1 and fold == 1 and width % LANES and LANES % width == 0:
        raise NotImplementedError(f"rows of {width} bytes do not fill 128 lanes: fold them (rows.fold)")
    if loader.high is not None and loader.high.fold != 2 * fold:
        raise NotImplementedError("rows of the high bits must hold twice as many slots as those of the low: fold them")
    return loader.head_dim, fold, planes


def _integer(loader: IntegerLoader, integers: bool) -> Reader:
    shape, symmetric = _shape(loader), loader.zero is None
    if loader.size == 1:
        unit = jnp.int8 if integers else jnp.bfloat16
        return Integer(unit, *shape, groups=len(loader.scale), bits=loader.bits, symmetric=symmetric)
    if LANES % loader.size or loader.size % 8:
        raise NotImplementedError(f"blocks of {loader.size} slots; 8, 16, 32, 64 or 128 can be read")
    return Blockwise(jnp.bfloat16, *shape, bits=loader.bits, symmetric=symmetric, size=loader.size)


def _fixed(loader: FixedLoader, integers: bool) -> Reader:
    unit = jnp.int8 if integers else jnp.bfloat16
    return Fixed(unit, *_shape(loader), groups=1, bits=loader.bits, symmetric=True)


def _codebook(loader: CodebookLoader, integers: bool) -> Reader:
    offsets = loader.offset is not None
    groups = int(offsets or loader.scale is not None)
    return Codebook(jnp.bfloat16, *_shape(loader), groups=groups, bits=loader.bits, offsets=offsets)


def _float8(loader: Float8Loader, integers: bool) -> Reader:
    mantissa, special = {"e4m3": (3, 0x7F), "e5m2": (2, 0x7C)}[loader.format]
    groups = int(loader.scale is not None)
    dim, fold = loader.head_dim, loader.codes.fold
    return Float8(jnp.bfloat16, dim, fold, groups=groups, mantissa=mantissa, special=special)


def _rotated(loader: RotatedLoader, integers: bool) -> Reader:
    inner = _inside(loader.inner, integers)
    if inner.dim % 2:
        raise NotImplementedError("rotated keys need channels in pairs")
    shared = loader.positions.shape[1] == 1
    return Rotated(jnp.bfloat16, inner.dim, inner.fold, inner.planes, inner=inner, shared=shared)


def _outliers(loader: OutlierLoader, integers: bool) -> Reader:
    if loader.size > 1:
        raise NotImplementedError("outliers per block of slots; those per slot can be read")
    inner = _inside(loader.inner, integers)
    return Corrected(jnp.bfloat16, inner.dim, inner.fold, inner.planes, inner=inner)


def _concat(loader: ConcatLoader, integers: bool) -> Reader:
    parts = [reader(part, integers) for part in loader.parts]
    if any(type(part) is not Reader or part.unit != parts[0].unit for part in parts):
        raise NotImplementedError("channels in several formats; several arrays of one floating type can be read")
    return Joined(parts[0].unit, loader.head_dim, turns=tuple(part.dim % LANES > 0 for part in parts))


def _scaled(loader: ScaledLoader, integers: bool) -> Reader:
    inner = _inside(loader.inner, integers)
    return Scaled(jnp.bfloat16, inner.dim, inner.fold, inner.planes, inner=inner)


def _projected(loader: LowRankLoader, integers: bool) -> Reader:
    inner = _inside(loader.inner, integers)
    if inner.fold > 1:
        raise NotImplementedError("latents of several slots in one row, from which keys are to be made")
    return Projected(jnp.bfloat16, loader.head_dim, inner=inner)


_READERS: dict[type, Callable[[Any, bool], Reader]] = {
    DenseLoader: _dense,
    IntegerLoader: _integer,
    FixedLoader: _fixed,
    CodebookLoader: _codebook,
    Float8Loader: _float8,
    RotatedLoader: _rotated,
    OutlierLoader: _outliers,
    ConcatLoader: _concat,
}

_INSIDE: dict[type, Callable[[Any, bool], Reader]] = {
    name: make for name, make in _READERS.items() if name not in (RotatedLoader, ConcatLoader)
} | {ScaledLoader: _scaled, LowRankLoader: _projected}
"""Readers of what is decoded tile by tile for the format around it."""


def reader(loader: Loader, integers: bool) -> Reader:
    """The reader of a loader; `integers`: whether the matrix unit multiplies int8.

    Raises:
      NotImplementedError: the format has none.
    """
    return _made(_READERS, loader, integers)


def _inside(loader: Loader, integers: bool) -> Reader:
    return _made(_INSIDE, loader, integers)


def _made(table: dict[type, Callable[[Any, bool], Reader]], loader: Loader, integers: bool) -> Reader:
    make = table.get(type(loader))
    if make is None:
        inside = " inside another format" if type(loader) in _READERS or type(loader) in _INSIDE else ""
        raise NotImplementedError(f"no reader of {type(loader).__name__}{inside}")
    return make(loader, integers)
