"""Attention of a few queries to stored keys and values, whatever their format."""

from pallas_kernels.decode_attention.api import decode_attention

__all__ = ["decode_attention"]
