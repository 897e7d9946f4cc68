"""Causal attention of a right-padded batch to itself."""

from pallas_kernels.prefill_attention.api import prefill_attention

__all__ = ["prefill_attention"]
