"""Key-driven grouped-query attention (KDGQA: Khan et al., 2024, arXiv 2408.08454), and fixed maps for each layer."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn

from kvjax.attention.allocation import KeyNorms
from kvjax.attention.base import AttentionConfig, AttentionKind, CacheShape
from kvjax.attention.grouped_query import GroupedQueryAttention
from kvjax.errors import UsageError


@dataclasses.dataclass(frozen=True)
class KeyDriven(AttentionKind):
    """Grouped-query attention in which the sizes of keys decide how many query heads each kv head serves.

    It has the parameters of grouped-query attention, and is it where all kv heads have keys of the same norm. With a
    cache, the prompt decides (its first chunk, where a prefill is streaming), and later tokens read by its map: the
    cache keeps 4 N bytes per row and layer beside what it would hold otherwise. Without one, all tokens decide, so a
    token's output depends on those behind it: such a model is trained on whole sequences, or as an encoder.

    A map that is data costs time: decode meets each kv head with all query heads and keeps what it needs.

    Attributes:
      allocation: the rule.
    """

    allocation: KeyNorms = KeyNorms()

    def module(self, config: AttentionConfig, dtype: Any, name: str) -> nn.Module:
        return GroupedQueryAttention(config, dtype, self.allocation, name=name)

    def cache_shape(self, config: AttentionConfig) -> CacheShape:
        return CacheShape(config.num_kv_heads, config.head_dim, mapped=True)

    def check(self, config: AttentionConfig) -> None:
        """Raises UsageError where another map is given, or there are too few query heads."""
        if config.kv_head_of_query is not None:
            raise UsageError("KeyDriven: the keys decide what query heads read; leave kv_head_of_query out.")
        least = self.allocation.least
        if config.num_heads < least * config.num_kv_heads:
            raise UsageError(
                f"KeyDriven: {config.num_heads} query heads are not enough for {config.num_kv_heads} kv heads to serve "
                f"at least {least} each; lower `least`."
            )


@dataclasses.dataclass(frozen=True)
class LayerMaps(AttentionKind):
    """Grouped-query attention with a fixed map per layer: what a training with moving norms has settled on.

    See `kvjax.attention.moving_norms.layer_maps`. Maps that are known beforehand compile to groups.

    Attributes:
      maps: for each layer, for each query head the kv head it reads.
    """

    maps: tuple[tuple[int, ...], ...]

    def module(self, config: AttentionConfig, dtype: Any, name: str) -> nn.Module:
        mapped = dataclasses.replace(config, kv_head_of_query=self.maps[config.layer])
        return GroupedQueryAttention(mapped, dtype, name=name)

    def cache_shape(self, config: AttentionConfig) -> CacheShape:
        return CacheShape(config.num_kv_heads, config.head_dim)

    def check(self, config: AttentionConfig) -> None:
        """Raises UsageError where maps do not fit the model."""
        if len(self.maps) != config.layers:
            raise UsageError(f"LayerMaps: {len(self.maps)} maps for {config.layers} layers; give one per layer.")
        reads = self.maps[config.layer]
        if len(reads) != config.num_heads or not all(0 <= head < config.num_kv_heads for head in reads):
            raise UsageError(
                f"LayerMaps: the map {reads} of layer {config.layer} does not give one of {config.num_kv_heads} kv "
                f"heads for each of {config.num_heads} query heads."
            )
        if config.kv_head_of_query is not None:
            raise UsageError("LayerMaps: layers have maps of their own; leave kv_head_of_query out.")
