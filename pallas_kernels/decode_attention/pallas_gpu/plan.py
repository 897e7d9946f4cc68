"""What is decided before the kernel is traced: formats, tiles, splits, and which requests are declined."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.loader import DenseLoader, IntegerLoader, Loader
from pallas_kernels.pages import Pages

SLOTS = 64
"""Slots per step: the rows of one matrix instruction."""

COLUMNS = 8
"""Queries are padded to a multiple of this, the narrowest matrix instruction."""

MAX_QUERIES = 16

WEIGHT_TERMS = 2
"""bfloat16 numbers whose sum is the weight of a slot, to 2**-17 of it."""

MAX_REGISTERS = 96
"""Of `Plan.registers`. By compiling: nothing spills at 92, some plans do from 100 on."""

RESIDENT = 3 * 132
"""Blocks that run at once: three on each processor of an H100, by registers and shared memory."""

BUFFERED_BYTES = 40 << 10
"""Shared memory of a block for tiles in flight."""


@dataclasses.dataclass(frozen=True)
class Stored:
    """How keys or values lie in memory.

    Attributes:
      bits: per channel; 16 is bfloat16.
      width: elements of a row; bytes for packed codes.
      head_dim: channels.
      groups: groups of channels with a scale of their own; 0 for bfloat16.
      has_zero: whether there are zero points beside the scales.
      block: slots that share their scales, which are then one per channel; 1 where each slot has its own.
    """

    bits: int
    width: int
    head_dim: int
    groups: int = 0
    has_zero: bool = False
    block: int = 1

    @property
    def packed(self) -> bool:
        return self.bits < 16

    @property
    def group(self) -> int:
        """Channels that share a scale within a slot."""
        return self.head_dim // max(1, self.groups)

    @property
    def piece(self) -> int:
        """Channels of a tile in shared memory: no wider than a plane or a group, so that both are cut between tiles."""
        return min(64, self.width, self.group)

    @property
    def itemsize(self) -> int:
        return 1 if self.packed else 2

    @property
    def affine(self) -> tuple[str, ...]:
        """Names of the scales and zero points, group by group."""
        return tuple(f"{kind}{g}" for kind in ("scale", "zero")[: 1 + self.has_zero] for g in range(self.groups))

    def plane(self) -> jax.Array:
        """int32 [H]: the plane of each channel."""
        return jnp.arange(self.head_dim) // self.width

    def unit(self) -> jax.Array:
        """f32 [H]: what a step of the code counts in the bytes that the kernel decodes, where no bits are shifted."""
        return 2.0 ** (self.bits * self.plane().astype(jnp.float32))

    def offset(self) -> jax.Array:
        """f32 [H]: what the kernel's decoding takes off: it reads the highest plane as signed bytes."""
        return jnp.where(self.plane() == 8 // self.bits - 1, 128.0, 0.0)

    @property
    def symmetric_zero(self) -> float:
        """The zero point of codes without one, in scales."""
        return -(2.0 ** (self.bits - 1))


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything static about one call.

    Attributes:
      keys, values: formats.
      batch, heads, queries, slots: B, K, R padded to a multiple of `COLUMNS`, S.
      splits: blocks that share the slots of a (row, head).
      stages: tiles of keys and of values that are in flight or in use.
      window: whether slots are compared with the window of each query.
      softcap: as in the op.
      page: slots per page; None where slots lie in order.
    """

    keys: Stored
    values: Stored
    batch: int
    heads: int
    queries: int
    slots: int
    splits: int
    stages: int
    window: bool
    softcap: float | None
    page: int | None

    @property
    def weightings(self) -> int:
        """Differently scaled copies of the probabilities, one per group of values."""
        return max(1, self.values.groups)

    @property
    def sums(self) -> tuple[tuple[int, int], ...]:
        """(64 channels, group) of each weighted sum of values; groups narrower than 64 channels share channels."""
        blocks, group = range(self.values.head_dim // 64), self.values.group
        meets = ((b, g) for b in blocks for g in range(self.weightings))
        return tuple((b, g) for b, g in meets if g * group < (b + 1) * 64 and b * 64 < (g + 1) * group)

    @property
    def statistics(self) -> int:
        """Numbers per query beside the sums: maximum, total, and the weighted sum of each scale and zero point."""
        return 2 + len(self.values.affine)

    @property
    def registers(self) -> int:
        """Per thread, for what is kept from step to step and for a decoded tile of keys."""
        tiles = self.statistics - 1 + len(self.sums) + (self.keys.head_dim // 64 if self.keys.block > 1 else 0)
        return tiles * self.queries // 2 + (self.keys.head_dim // 4 if self.keys.packed else 0)


def decide(
    q: jax.Array, keys: Loader, values: Loader, pages: Pages | None, window: int | None, softcap: float | None
) -> Plan:
    """The plan for a request; q [B, K, R, H] in the channels that the keys store.

    Raises:
      NotImplementedError: the kernel does not do this.
    """
    batch, heads, queries, _ = q.shape
    stored = _stored("keys", keys), _stored("values", values)
    slots = keys.count if pages is None else pages.count
    if pages is not None and pages.size % SLOTS:
        raise NotImplementedError(f"pages: of a multiple of {SLOTS} slots; got {pages.size}")
    if stored[1].block > 1:
        raise NotImplementedError("values: scales per block of slots are not read by this kernel")
    if queries > MAX_QUERIES:
        raise NotImplementedError(f"takes at most {MAX_QUERIES} queries per kv head; got {queries}")
    if slots < SLOTS:
        raise NotImplementedError(f"takes at least {SLOTS} slots; got {slots}")
    padded = -(-queries // COLUMNS) * COLUMNS
    splits = max(1, min(-(-2 * RESIDENT // (batch * heads)), slots // (2 * SLOTS)))
    stages = max(2, min(4, BUFFERED_BYTES // (SLOTS * sum(s.width * s.itemsize for s in stored))))
    made = Plan(
        *stored, batch, heads, padded, slots, splits, stages, window is not None, softcap, pages.size if pages else None
    )
    if made.registers > MAX_REGISTERS:
        raise NotImplementedError(
            f"{queries} queries of {stored[0].head_dim} channels and {made.weightings} groups of values do not fit "
            f"into registers: {made.registers} would be kept, {MAX_REGISTERS} can be"
        )
    return made


def _stored(side: str, loader: Loader) -> Stored:
    if loader.head_dim % 64 or loader.head_dim > 256:
        raise NotImplementedError(f"{side}: heads have 64, 128, 192 or 256 channels here; got {loader.head_dim}")
    if type(loader) is DenseLoader:
        if loader.x.dtype != jnp.bfloat16:
            raise NotImplementedError(f"{side}: uncoded slots are bfloat16 here; got {loader.x.dtype}")
        return Stored(16, loader.head_dim, loader.head_dim)
    if type(loader) is not IntegerLoader:
        raise NotImplementedError(f"{side}: a {type(loader).__name__} is not read by this kernel")
    if loader.bits not in (8, 4, 2) or loader.codes.fold > 1:
        raise NotImplementedError(f"{side}: codes of {loader.bits} bits, {loader.codes.fold} slots a row, are not read")
    stored = Stored(
        loader.bits, loader.codes.width, loader.head_dim, len(loader.scale), loader.zero is not None, loader.block
    )
    if stored.piece % 16 or stored.width % stored.piece or stored.group % stored.piece:
        raise NotImplementedError(f"{side}: groups of {stored.group} channels and planes of {stored.width} do not meet")
    if stored.block % SLOTS and SLOTS % stored.block:
        raise NotImplementedError(f"{side}: blocks of {stored.block} slots and steps of {SLOTS} do not meet")
    for x in loader.scale + (loader.zero or ()):
        if x.shape[-1] * x.dtype.itemsize % 16:
            raise NotImplementedError(f"{side}: rows of {x.shape[-1]} {x.dtype} scales are no multiple of 16 bytes")
    return stored
