"""Selective attention (Leviathan et al., 2024, "Selective Attention Improves Transformer", arXiv 2410.02703)."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn

from kvjax.attention.base import AttentionConfig, AttentionKind, CacheShape
from kvjax.attention.grouped_query import GroupedQueryAttention
from kvjax.errors import UsageError


@dataclasses.dataclass(frozen=True)
class SelectiveAttention(AttentionKind):
    """Grouped-query attention in which every token may ask that earlier ones be read less by all later queries.

    What token t asks of token s is S[t, s] = max(0, scale * q_t·k_s), by the rotated query and key of query head 0, for
    0 < s < t within the window: neither the first token nor the asking one is hidden. The logits of query t in all
    heads are lowered at s by F[t, s], the sum of S[t', s] over t' < t. It has no parameters of its own. A cache carries
    one number per token seen, F's last row, by which the policy `Hidden` evicts; `kvjax.training.memory_loss` trains a
    model to hide more.
    """

    def module(self, config: AttentionConfig, dtype: Any, name: str) -> nn.Module:
        return GroupedQueryAttention(config, dtype, selective=True, name=name)

    def cache_shape(self, config: AttentionConfig) -> CacheShape:
        return CacheShape(config.num_kv_heads, config.head_dim, selective=True)

    def check(self, config: AttentionConfig) -> None:
        if config.softcap is not None:
            raise UsageError(
                f"attention_softcap is {config.softcap}, but selective attention takes its selections from plain "
                "logits; leave it None."
            )
