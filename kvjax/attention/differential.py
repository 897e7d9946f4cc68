"""Fewer key heads than value heads, narrow keys, wide queries (DiffQKV of Sigma: Lin et al., arXiv 2501.13629)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import flax.linen as nn
import jax

from kvjax.attention.base import AttentionConfig, AttentionKind, AttentionModule, CacheShape, LayerCacheProtocol
from kvjax.attention.projection import Projection
from kvjax.errors import UsageError
from kvjax.typing import Array
from pallas_kernels.rope import Rope

QueryActivation = Literal["none", "silu", "gelu"]

_ACTIVATIONS: Mapping[QueryActivation, Callable[[Array], Array]] = {
    "none": lambda x: x,
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}


@dataclasses.dataclass(frozen=True)
class DiffQKV(AttentionKind):
    """Queries, keys and values of sizes of their own: what is cached is small, what is not cached may be large.

    Of N query heads, head i reads key head floor(i K / N) and value head floor(i n_v / N) (section 2 of the paper),
    K being the model's `num_kv_heads` and n_v `value_heads`. A cache stores K · key_dim + n_v · H numbers per token,
    where grouped-query attention with n_v heads stores 2 · n_v · H. A cache keeps the n_v / K value heads beside a key
    head as one value of n_v / K · H channels (`Step.value_part`), so that no key is stored twice; codecs whose scales
    span a head then span those of one key head.

    Sigma 1.5B has N = 32, K = 4, n_v = 16, keys as wide as values and query_hidden = 1.5 D. Its loading of the 100 best
    values alone is a way to read a cache: `kvjax.cache.methods.top_values`.

    With value_heads = K, key_dim = H and no query_hidden this is grouped-query attention, with the same parameters.

    Attributes:
      value_heads: n_v, a multiple of K that divides N.
      key_dim: channels of queries and keys; None is H. Rotary embedding turns all of them. The factor on q·k is that of
        the model times sqrt(H / key_dim), so by default key_dim ** -0.5. Queries are projected to key_dim; the paper's
        ablation halves it and does not say how queries follow.
      query_hidden: queries are two maps of the layer's input, D to query_hidden to N · key_dim, instead of one
        (augmented queries); None is one map.
      query_activation: between the two. The description that this follows names none, so the default is "none"; then
        two maps have no more functions to choose from than one, and what they change is training.
    """

    value_heads: int
    key_dim: int | None = None
    query_hidden: int | None = None
    query_activation: QueryActivation = "none"

    def __post_init__(self) -> None:
        for name in ("value_heads", "key_dim", "query_hidden"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise UsageError(f"DiffQKV: {name} must be at least 1, got {size}.")
        if self.query_activation not in get_args(QueryActivation):
            raise UsageError(
                f"DiffQKV: unknown query_activation {self.query_activation!r}; one of "
                f"{', '.join(get_args(QueryActivation))}."
            )

    def module(self, config: AttentionConfig, dtype: Any, name: str) -> nn.Module:
        return DifferentialAttention(config, dtype, self, name=name)

    def cache_shape(self, config: AttentionConfig) -> CacheShape:
        key_dim, value_dim = self.rotary_dim(config), self.parts(config) * config.head_dim
        return CacheShape(config.num_kv_heads, key_dim, None if value_dim == key_dim else value_dim)

    def rotary_dim(self, config: AttentionConfig) -> int:
        return config.head_dim if self.key_dim is None else self.key_dim

    def scale(self, config: AttentionConfig) -> float:
        """The factor on q·k."""
        return config.scale * math.sqrt(config.head_dim / self.rotary_dim(config))

    def parts(self, config: AttentionConfig) -> int:
        """Value heads beside one key head."""
        return self.value_heads // config.num_kv_heads

    def value_part(self, config: AttentionConfig) -> tuple[int, ...] | None:
        """See `Step.value_part`: of value head floor(i n_v / N), its place beside its key head."""
        parts, heads = self.parts(config), config.num_heads
        return None if parts == 1 else tuple(i * self.value_heads // heads % parts for i in range(heads))

    def check(self, config: AttentionConfig) -> None:
        """Raises UsageError where heads do not divide, or a head map contradicts floor(i K / N)."""
        heads, kv_heads = config.num_heads, config.num_kv_heads
        if self.value_heads % kv_heads:
            raise UsageError(
                f"DiffQKV: value_heads {self.value_heads} is not a multiple of num_kv_heads {kv_heads}, the number of "
                "key heads, so a cache cannot keep value heads beside key heads; choose fewer key heads."
            )
        if heads % self.value_heads:
            raise UsageError(
                f"DiffQKV: num_heads {heads} is not a multiple of value_heads {self.value_heads}, so the query heads "
                "of a value head would not share a key head; choose value_heads that divides num_heads."
            )
        if config.kv_head_of_query is not None:
            raise UsageError("DiffQKV reads key head floor(i K / N) with query head i; leave kv_head_of_query out.")


class DifferentialAttention(AttentionModule):
    """Projects to queries and keys of key_dim channels and to value heads of H, K groups of them.

    Attributes:
      kind: the variant's settings.
    """

    kind: DiffQKV = DiffQKV(1)

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
        config, kind, embed_dim = self.config, self.kind, x.shape[-1]
        kv_heads, key_dim, value_dim = (
            config.num_kv_heads,
            kind.rotary_dim(config),
            kind.parts(config) * config.head_dim,
        )
        hidden = self._query_input(x)
        q = self.heads("q", config.num_heads, key_dim, hidden.shape[-1])(hidden)
        k = self.heads("k", kv_heads, key_dim, embed_dim)(x)
        v = self.heads("v", kv_heads, value_dim, embed_dim)(x)
        q, k = self.normed(q, k)
        output = self.output(config.num_heads, config.head_dim, embed_dim)
        return self.attended(
            x,
            output,
            cache,
            queries=q,
            keys=k,
            values=v,
            positions=positions,
            valid=valid,
            rope=rope,
            scale=kind.scale(config),
            value_part=kind.value_part(config),
        )

    def _query_input(self, x: Array) -> Array:
        """What queries are projected from: [B, T, D], or [B, T, query_hidden]."""
        width = self.kind.query_hidden
        if width is None:
            return x
        widen = Projection((x.shape[-1],), (width,), use_bias=self.config.qkv_bias, dtype=self.dtype, name="q_hidden")
        return _ACTIVATIONS[self.kind.query_activation](widen(x))
