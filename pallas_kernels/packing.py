"""Codes of 8, 4, 2 or 1 bits in bytes, as planes: byte j of a row of H·bits/8 bytes holds channels j, j + P, j + 2P, …

P = H·bits/8 is the number of bytes; the lowest bits belong to the lowest channel. Planes need no interleave: each one
is a contiguous range of channels, so that a kernel can use it without moving data.

Codes of 3 bits do not fill bytes. Their low 2 bits are packed as codes of 2 bits and their high bits as codes of 1 bit,
in two arrays: code = low + 4 · high. A product with the codes is the sum of products with the planes of either, so no
plane of one has to be aligned with those of the other.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

WIDTHS = (8, 4, 2, 1)
"""Bits per code that fill a byte."""

LOW_BITS = {8: 8, 4: 4, 3: 2, 2: 2, 1: 1}
"""Bits per code of each supported format, and how many of them are in the first array."""


def pack(codes: jax.Array, bits: int) -> jax.Array:
    """uint8 [..., H·bits/8] from integer codes [..., H] in [0, 2**bits).

    Raises:
      ValueError: `bits` is not in `WIDTHS`, or the codes of a row do not fill whole bytes.
    """
    planes = _planes(bits)
    if codes.shape[-1] % planes:
        raise ValueError(f"{codes.shape[-1]} codes of {bits} bits do not fill whole bytes; need a multiple of {planes}")
    parts = jnp.split(codes.astype(jnp.uint8), planes, axis=-1)
    packed = parts[0]
    for index, part in enumerate(parts[1:], start=1):
        packed = packed | (part << (index * bits))
    return packed


def unpack_planes(packed: jax.Array, bits: int) -> tuple[jax.Array, ...]:
    """The 8/bits planes of `packed` uint8 [..., P], each uint8 [..., P]; plane i holds channels i·P … (i+1)·P - 1."""
    mask = jnp.uint8(2**bits - 1)
    planes = _planes(bits)
    if planes == 1:
        return (packed,)
    return tuple((packed >> (index * bits)) & mask for index in range(planes))


def unpack_doubled(packed: jax.Array, bits: int) -> tuple[jax.Array, ...]:
    """Twice the codes of `unpack_planes`, for 4, 2 or 1 bits: who has a scale halves it.

    Each plane then takes a shift and a mask. LLVM makes vector code of both, but of neither alone where a row has 32
    bytes, as it unrolls the loop over them: on a CPU the first and the last plane took four times as long as others.
    """
    mask = jnp.uint8(2 * (2**bits - 1))
    return ((packed << 1) & mask, *((packed >> (index * bits - 1)) & mask for index in range(1, _planes(bits))))


def unpack(packed: jax.Array, bits: int) -> jax.Array:
    """uint8 codes [..., H] from `packed` uint8 [..., H·bits/8]."""
    planes = unpack_planes(packed, bits)
    return planes[0] if len(planes) == 1 else jnp.concatenate(planes, axis=-1)


def split(codes: jax.Array, bits: int) -> tuple[jax.Array, jax.Array | None]:
    """Codes [..., H] of 8, 4, 3, 2 or 1 bits, packed: (low, high), high None except for 3 bits.

    low is uint8 [..., H·LOW_BITS[bits]/8], high uint8 [..., H/8].
    """
    if LOW_BITS[bits] == bits:
        return pack(codes, bits), None
    codes = codes.astype(jnp.uint8)
    return pack(codes & 3, 2), pack(codes >> 2, 1)


def join_planes(low: jax.Array, high: jax.Array | None, bits: int) -> tuple[jax.Array, ...]:
    """The planes of codes that were `split`, each uint8 [..., P] with P the bytes of `low`."""
    planes = unpack_planes(low, LOW_BITS[bits])
    if high is None:
        return planes
    # Bytes of their own, cut into planes: XLA on a CPU computes a join inside a larger loop element by element.
    tops = jax.lax.optimization_barrier(unpack(high, 1))
    return tuple(p | (top << 2) for p, top in zip(planes, jnp.split(tops, len(planes), axis=-1), strict=True))


def _planes(bits: int) -> int:
    if bits not in WIDTHS:
        raise ValueError(f"codes have {', '.join(map(str, WIDTHS))} bits; got {bits}")
    return 8 // bits
