"""All ops, and what of them runs here."""

from __future__ import annotations

from pallas_kernels.attention_mass.api import OP as ATTENTION_MASS
from pallas_kernels.cache_update.api import OP as CACHE_UPDATE
from pallas_kernels.decode_attention.api import OP as DECODE_ATTENTION
from pallas_kernels.dispatch import Support
from pallas_kernels.prefill_attention.api import OP as PREFILL_ATTENTION

OPS = (PREFILL_ATTENTION, DECODE_ATTENTION, ATTENTION_MASS, CACHE_UPDATE)


def supported(platform: str | None = None) -> tuple[Support, ...]:
    """Every implementation of every op, with the reason why it does not run where one does not.

    Args:
      platform: 'cpu', 'gpu' or 'tpu'; None means the backend of this process.
    """
    return tuple(row for op in OPS for row in op.support(platform))
