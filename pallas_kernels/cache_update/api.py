"""The public op and the order in which its implementations are tried."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from pallas_kernels.cache_update import pallas_tpu, reference, specs, xla
from pallas_kernels.dispatch import Implementation, Op
from pallas_kernels.rows import Rows, each

PyTree = Any

OP = Op(
    name="cache_update",
    implementations=(
        Implementation("pallas_tpu", pallas_tpu.run, platforms=("tpu",)),
        Implementation("xla", xla.run),
        Implementation("reference", reference.run),
    ),
    example=specs.SPECS[0].abstract,
)


def cache_update(
    store: PyTree,
    tokens: PyTree,
    block: jax.Array,
    *,
    encode: Callable[[PyTree], PyTree] = lambda tokens: tokens,
    implementation: str | None = None,
) -> PyTree:
    """Encodes one token, or one block of tokens, and writes it over block number `block` of a store.

    Under a `jit` that donates the store nothing else is read or copied.

    Args:
      store: leaves [B, K or 1, n', ...], an entry per slot or per block of slots, and `Rows`.
      tokens: what `encode` takes, [B, K, tokens, H].
      block: int32 [B, K or 1], which run of entries to overwrite: in a leaf whose fresh part has n entries, entries
        block·n … (block + 1)·n - 1. A block beyond the last writes nothing.
      encode: tokens -> fresh store of the structure of `store`, leaves [B, K or 1, n, ...]; a codec's `encode`.
      implementation: 'pallas_tpu', 'xla' or 'reference'; None picks.

    Returns:
      The store, updated.

    Raises:
      ValueError: the encoded tokens do not have the structure of the store, or n does not divide n'.
      NotImplementedError: the named implementation cannot do this.
    """
    fresh = encode(tokens)
    each(_check, store, fresh)
    return OP(store, fresh, block, implementation=implementation)


def _check(leaf: jax.Array | Rows, new: jax.Array | Rows) -> None:
    have, put = (x.slots if isinstance(x, Rows) else x.shape[2] for x in (leaf, new))
    if type(leaf) is not type(new) or put == 0 or have % put:
        raise ValueError(f"{put} fresh entries do not divide the {have} entries of a leaf into blocks")
