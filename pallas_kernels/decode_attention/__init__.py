"""Attention of a few queries to stored keys and values, whatever their format."""

from pallas_kernels.decode_attention.api import decode_attention
from pallas_kernels.decode_attention.chosen import decode_logits, mix_slots

__all__ = ["decode_attention", "decode_logits", "mix_slots"]
