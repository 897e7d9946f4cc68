"""Real workloads of `cache_update`, read by the tests, benchmarks and the hardware table."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.rows import Rows

PyTree = Any


@dataclasses.dataclass(frozen=True)
class UpdateSpec:
    """One workload: a store of codes, scales and exact tokens, of which one block is overwritten.

    Attributes:
      tokens: in a block. block_scales: scales are per block, [B, K, M, H], instead of per slot, [B, K, S].
      bytes_per_slot: of the codes. fold: slots per row of codes. per_head: each head writes to a block of its own.
      beyond: the last row of the batch writes nothing.
    """

    name: str
    batch: int
    kv_heads: int
    slots: int
    head_dim: int
    tokens: int = 1
    block_scales: bool = False
    bytes_per_slot: int = 128
    fold: int = 1
    per_head: bool = False
    beyond: bool = False

    donated = (0,)
    """Positional arguments that a real step donates."""

    def arrays(self, seed: int = 0) -> tuple[PyTree, PyTree, jax.Array]:
        """(store, fresh, block) with random contents."""
        keys = iter(jax.random.split(jax.random.key(seed), 8))

        def leaves(slots: int, fold: int) -> PyTree:
            lead = (self.batch, self.kv_heads)
            codes = jax.random.bits(next(keys), (*lead, slots, self.bytes_per_slot), jnp.uint8)
            scales = (slots // self.tokens, self.head_dim) if self.block_scales else (slots,)
            return {
                "codes": Rows.of(codes, fold),
                "scale": jax.random.normal(next(keys), (*lead, *scales), jnp.bfloat16),
                "exact": jax.random.normal(next(keys), (*lead, slots, self.head_dim), jnp.bfloat16),
            }

        heads = self.kv_heads if self.per_head else 1
        block = jax.random.randint(next(keys), (self.batch, heads), 0, self.slots // self.tokens, jnp.int32)
        if self.beyond:
            block = block.at[-1].set(self.slots // self.tokens)
        return leaves(self.slots, self.fold), leaves(self.tokens, 1), block

    def arguments(self, seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Random (args, kwargs) of the op."""
        return self.arrays(seed), {}

    def abstract(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Shapes only: (args, kwargs) of the op."""
        return jax.eval_shape(self.arrays), {}


SPECS = (
    UpdateSpec("int8_token", 2, 2, 512, 128),
    UpdateSpec("int4_token", 2, 2, 1024, 128, bytes_per_slot=64, fold=2, per_head=True, beyond=True),
    UpdateSpec("int2_token", 1, 3, 1024, 64, bytes_per_slot=16, fold=8),
    UpdateSpec("plain_token", 3, 2, 70, 32, bytes_per_slot=16, per_head=True),
    UpdateSpec("kivi4_block", 2, 2, 512, 128, tokens=32, block_scales=True, bytes_per_slot=64, fold=2, beyond=True),
    UpdateSpec("kivi2_block", 1, 2, 1024, 128, tokens=32, block_scales=True, bytes_per_slot=32, fold=4, per_head=True),
    UpdateSpec("long_block", 1, 1, 1024, 128, tokens=128, block_scales=True),
)

HARDWARE = (
    UpdateSpec("int8_token", 4, 8, 4096, 128),
    UpdateSpec("int4_token", 4, 8, 4096, 128, bytes_per_slot=64, fold=2),
    UpdateSpec("int4_token_per_head", 4, 8, 4096, 128, bytes_per_slot=64, fold=2, per_head=True),
    UpdateSpec("kivi4_block", 4, 8, 4096, 128, tokens=32, block_scales=True, bytes_per_slot=64, fold=2),
)
