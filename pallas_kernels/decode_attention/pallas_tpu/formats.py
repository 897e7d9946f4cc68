"""Which loader has which reader."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from pallas_kernels.decode_attention.pallas_tpu.decoded import Blockwise, Rotated
from pallas_kernels.decode_attention.pallas_tpu.reader import Integer, Reader
from pallas_kernels.loader import DenseLoader, IntegerLoader, Loader, RotatedLoader
from pallas_kernels.rows import LANES


def _dense(loader: DenseLoader, integers: bool) -> Reader:
    if loader.x.dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(f"no matrix unit for {loader.x.dtype}")
    return Reader(loader.x.dtype, loader.head_dim)


def _integer(loader: IntegerLoader, integers: bool) -> Reader:
    planes, width, fold = 8 // loader.bits, loader.codes.width, loader.codes.fold
    if loader.bits == 3:
        raise NotImplementedError("no reader of 3-bit codes")
    if planes > 1 and fold == 1 and width % LANES and LANES % width == 0:
        raise NotImplementedError(f"rows of {width} bytes do not fill 128 lanes: fold them (rows.fold)")
    shape, symmetric = (loader.head_dim, fold, planes), loader.zero is None
    if loader.size == 1:
        unit = jnp.int8 if integers else jnp.bfloat16
        return Integer(unit, *shape, groups=len(loader.scale), bits=loader.bits, symmetric=symmetric)
    if LANES % loader.size or loader.size % 8:
        raise NotImplementedError(f"blocks of {loader.size} slots; 8, 16, 32, 64 or 128 can be read")
    return Blockwise(jnp.bfloat16, *shape, bits=loader.bits, symmetric=symmetric, size=loader.size)


def _rotated(loader: RotatedLoader, integers: bool) -> Reader:
    inner = reader(loader.inner, integers)
    if isinstance(inner, Rotated) or inner.dim % 2:
        raise NotImplementedError("rotated keys need channels in pairs, rotated once")
    shared = loader.positions.shape[1] == 1
    return Rotated(jnp.bfloat16, inner.dim, inner.fold, inner.planes, inner=inner, shared=shared)


_READERS: dict[type, Callable[[Any, bool], Reader]] = {
    DenseLoader: _dense,
    IntegerLoader: _integer,
    RotatedLoader: _rotated,
}


def reader(loader: Loader, integers: bool) -> Reader:
    """The reader of a loader; `integers`: whether the matrix unit multiplies int8.

    Raises:
      NotImplementedError: the format has none.
    """
    make = _READERS.get(type(loader))
    if make is None:
        raise NotImplementedError(f"no reader of {type(loader).__name__}")
    return make(loader, integers)
