"""Attention kernels: one algorithm per op, formats as loaders. Imports nothing but JAX and NumPy."""

from pallas_kernels.attention_mass import attention_mass
from pallas_kernels.cache_update import cache_update
from pallas_kernels.decode_attention import decode_attention, decode_logits, mix_slots
from pallas_kernels.dispatch import Support
from pallas_kernels.loader import (
    BlockLoader,
    CodebookLoader,
    ConcatLoader,
    DenseLoader,
    Float8Loader,
    IntegerLoader,
    Loader,
    LowRankLoader,
    OutlierLoader,
    RotatedLoader,
    ScaledLoader,
)
from pallas_kernels.merge import merge
from pallas_kernels.ops import OPS, supported
from pallas_kernels.pages import Pages
from pallas_kernels.prefill_attention import prefill_attention
from pallas_kernels.rope import Rope

__all__ = [
    "OPS",
    "BlockLoader",
    "CodebookLoader",
    "ConcatLoader",
    "DenseLoader",
    "Float8Loader",
    "IntegerLoader",
    "Loader",
    "LowRankLoader",
    "OutlierLoader",
    "Pages",
    "Rope",
    "RotatedLoader",
    "ScaledLoader",
    "Support",
    "attention_mass",
    "cache_update",
    "decode_attention",
    "decode_logits",
    "merge",
    "mix_slots",
    "prefill_attention",
    "supported",
]
