"""Keys of all heads as one shorter vector, values of groups of heads ("Effectively Compress KV Heads for LLM", Yu et
al., 2024, arXiv 2406.07056, section 3): what trained multi-head attention with rotary embedding is converted into."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from kvjax.attention.base import AttentionConfig, AttentionKind, AttentionModule, CacheShape, LayerCacheProtocol
from kvjax.errors import UsageError
from kvjax.typing import Array
from pallas_kernels.rope import Rope


@dataclasses.dataclass(frozen=True)
class ProjectedKeys(AttentionKind):
    """The cache holds `heads` · H channels of keys and as many of values, whatever the number of key heads.

    Rotation does not commute with a projection over heads, so it comes first, and the cache sees rotated keys and no
    rotary table: methods that renumber positions, or that store keys before rotation, do neither here.

    Attributes:
      heads: value heads. K, the config's `num_kv_heads`, is a multiple of it: K / heads key heads in a row have one
        value head, which their query heads read.
    """

    heads: int

    def module(self, config: AttentionConfig, dtype: Any, name: str) -> nn.Module:
        return ProjectedKeysAttention(config, dtype, self.heads, name=name)

    def cache_shape(self, config: AttentionConfig) -> CacheShape:
        return CacheShape(1, self.heads * config.head_dim)

    def check(self, config: AttentionConfig) -> None:
        if self.heads < 1 or config.num_kv_heads % self.heads:
            raise UsageError(
                f"ProjectedKeys: {config.num_kv_heads} key heads are not a multiple of heads={self.heads}; choose a "
                "divisor."
            )
        reads = config.kv_head_of_query or (config.num_kv_heads - 1,)
        if max(reads) * self.heads // config.num_kv_heads < self.heads - 1:
            raise UsageError(f"ProjectedKeys: no query head of {reads} reads the last of {self.heads} value heads.")


class ProjectedKeysAttention(AttentionModule):
    """k' = Ψ [k_1; …; k_K] of the rotated keys, and q'_n = Ψ_g q_n, where g is the key head of query head n.

    Then q'_n·k' = q_n·(Ψᵀ_g Ψ k), which is q_n·k_g where Ψ has orthonormal columns; Ψ is the parameter `key_basis`
    [K, H, R] with R = `value_heads` · H, transposed.

    Attributes:
      value_heads: see `ProjectedKeys.heads`.
    """

    value_heads: int = 1

    @nn.compact
    def __call__(
        self,
        x: Array,
        *,
        positions: Array,
        valid: Array,
        rope: Rope | None,
        cache: LayerCacheProtocol | None = None,
    ) -> tuple[Array, Any]:
        config, embed_dim = self.config, x.shape[-1]
        n, k, h = config.num_heads, config.num_kv_heads, config.head_dim
        queries, keys = self.normed(self.heads("q", n, h, embed_dim)(x), self.heads("k", k, h, embed_dim)(x))
        values = self.heads("v", self.value_heads, h, embed_dim)(x)
        if rope is not None:
            queries, keys = (rope.rotate(one, positions[..., None]) for one in (queries, keys))
        shape = (k, h, self.value_heads * h)
        basis = self.param("key_basis", _orthonormal, shape, self.dtype).astype(x.dtype)
        reads = config.kv_head_of_query or tuple(head * k // n for head in range(n))
        output = self.output(n, h, embed_dim)
        return self.attended(
            x,
            output,
            cache,
            queries=jnp.einsum("btnh,nhr->btnr", queries, basis[np.array(reads)]),
            keys=jnp.einsum("btkh,khr->btr", keys, basis)[:, :, None],
            values=values.reshape(*values.shape[:2], 1, -1),
            positions=positions,
            valid=valid,
            scale=config.scale,
            value_part=tuple(head * self.value_heads // k for head in reads),
        )


def _orthonormal(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """A random basis [K, H, R] with orthonormal columns; 16-bit numbers have no QR of their own."""
    return nn.initializers.orthogonal()(key, shape, jnp.float32).astype(dtype)
