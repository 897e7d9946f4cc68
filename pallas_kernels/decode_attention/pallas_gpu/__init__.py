"""`decode_attention` for Hopper GPUs in Mosaic GPU. It compiles; it has not run on a device yet."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.decode_attention.pallas_gpu.plan import decide
from pallas_kernels.loader import Loader
from pallas_kernels.pages import Pages, valid_slots


def run(
    q: jax.Array,
    keys: Loader,
    values: Loader,
    *,
    lengths: jax.Array | None = None,
    valid: jax.Array | None = None,
    pages: Pages | None = None,
    positions: jax.Array | None,
    query_positions: jax.Array | None,
    window: int | None,
    scale: float,
    softcap: float | None,
    bias: jax.Array | None,
    return_logits: bool,
) -> tuple[jax.Array, ...]:
    """See `api.decode_attention`; the logits are not returned."""
    if return_logits:
        raise NotImplementedError("the logits stay in the kernel")
    try:
        from pallas_kernels.decode_attention.pallas_gpu import kernel, operands
    except ImportError as error:  # jaxlib without GPU support, or no absl-py, which Mosaic GPU needs
        raise NotImplementedError(f"Mosaic GPU cannot be imported: {error}") from error
    queries, shift = keys.to_core(q * scale)
    if not isinstance(shift, float):
        raise NotImplementedError("keys: channels with an offset are not read by this kernel")
    decided = decide(queries, keys.core, values.core, pages, window, softcap)
    oldest = None if window is None or query_positions is None else query_positions - (window - 1)
    slots = operands.Slots(valid_slots(q.shape[0], decided.slots, lengths, valid), bias, positions, oldest, pages)
    arrays = operands.inputs(decided, queries, keys.core, values.core, slots)
    sums, total, lse = (x[:, :, : q.shape[2]] for x in operands.result(decided, *kernel.call(decided, arrays)))
    out = values.from_core(sums, total)
    return out / jnp.where(total == 0, 1.0, total), lse
