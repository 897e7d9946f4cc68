"""Temperatures of queries and gates of values (selective self-attention, SSA: Zhang et al., 2024, arXiv 2411.12892)."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp

from kvjax.attention.base import AttentionConfig, AttentionKind, AttentionModule, CacheShape, LayerCacheProtocol
from kvjax.errors import UsageError
from kvjax.typing import Array
from pallas_kernels.rope import Rope

Form = Literal["paper", "released", "released linear"]
Features = Literal["projections", "input"]

_START: dict[Form, float] = {"paper": -4.5, "released": 1.5, "released linear": 0.011}


@dataclasses.dataclass(frozen=True)
class SelfSelective(AttentionKind):
    """Grouped-query attention whose queries are multiplied by an inverse temperature, and whose values by a gate.

    The query of a token x at position n, counted from 1 in the text (never in the cache), is multiplied by

        tau_q(x, n) = tanh(f_q(x)) + 1 + sigmoid(alpha) · log n,

    one number for all heads, and its value by tau_v(x) = tanh(f_v(x)) + 1, before it is cached: a cache holds and costs
    what it would otherwise. f_q(x) = w_q · phi_q(x) and f_v(x) = w_v · phi_v(x), w_q and w_v being learnt vectors, and
    alpha a learnt number per layer. Keys have no temperature, as in the paper. How phi shares weights, and the 1 of
    tau_v (so that no gate is the plain value), are choices of this library: the description that it follows leaves them
    open.

    Parameters beyond those of grouped-query attention, per layer: N H + K H + 1 with features="projections", 2 D + 1
    with "input", 1 where only positions count. That is below 0.5 % of a decoder from about D = 64 on; of a smaller
    one it may be more.

    It is exactly grouped-query attention where w_q = w_v = 0 and alpha = -inf ("released": beta = +inf; "released
    linear": beta = 0). A new model has w_q = w_v = 0, so that only positions count at first.

    Attributes:
      form: "paper"; or what the authors have released, the position alone: "released" multiplies logits by
        1 + exp(-exp(beta)) · log n, and "released linear" by 1 + beta · log n. Neither has w_q, w_v and a gate.
      features: phi. "projections": gelu of all the layer's own queries, or values, before their norm: a network whose
        first layer is the projection that is there anyway. On a mesh that cuts heads its sum over heads is exchanged,
        a number per token. "input": the layer's input.
      start: alpha, or beta, of a new model. None: -4.5 (sigmoid 0.011), of "released" 1.5 as for its GPT-2 (0.011; its
        fine-tuning starts at 2.0), of "released linear" 0.011.
    """

    form: Form = "paper"
    features: Features = "projections"
    start: float | None = None

    def __post_init__(self) -> None:
        for name, words in (("form", Form), ("features", Features)):
            if getattr(self, name) not in get_args(words):
                raise UsageError(
                    f"SelfSelective: unknown {name} {getattr(self, name)!r}; one of {', '.join(get_args(words))}."
                )
        if self.start is not None and math.isnan(self.start):
            raise UsageError("SelfSelective: start is not a number; leave it out for the default.")

    @property
    def by_token(self) -> bool:
        """Whether what a token is counts, and not its position alone."""
        return self.form == "paper"

    @property
    def first(self) -> float:
        """alpha, or beta, of a new model."""
        return _START[self.form] if self.start is None else self.start

    def slope(self, alpha: Array) -> Array:
        """What log n is multiplied by; f32 []."""
        if self.form == "paper":
            return jax.nn.sigmoid(alpha)
        return jnp.exp(-jnp.exp(alpha)) if self.form == "released" else alpha

    def module(self, config: AttentionConfig, dtype: Any, name: str) -> nn.Module:
        return SelfSelectiveAttention(config, dtype, self, name=name)

    def cache_shape(self, config: AttentionConfig) -> CacheShape:
        return CacheShape(config.num_kv_heads, config.head_dim)


class SelfSelectiveAttention(AttentionModule):
    """Projects as grouped-query attention does, and scales queries and values in float32.

    Attributes:
      kind: the variant's settings.
    """

    kind: SelfSelective = SelfSelective()

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
        q = self.heads("q", config.num_heads, config.head_dim, embed_dim)(x)
        k = self.heads("k", config.num_kv_heads, config.head_dim, embed_dim)(x)
        v = self.heads("v", config.num_kv_heads, config.head_dim, embed_dim)(x)
        temperature = 1.0 + self._slope() * jnp.log(jnp.maximum(positions, 0) + 1.0)
        if self.kind.by_token:
            temperature = temperature + self._of_token("query_token", q, x)
            v = _scaled(v, 1.0 + self._of_token("value_token", v, x))
        q, k = self.normed(q, k)
        output = self.output(config.num_heads, config.head_dim, embed_dim)
        return self.attended(
            x,
            output,
            cache,
            queries=_scaled(q, temperature),
            keys=k,
            values=v,
            positions=positions,
            valid=valid,
            rope=rope,
            scale=config.scale,
            kv_head_of_query=config.kv_head_of_query,
        )

    def _slope(self) -> Array:
        """f32 []."""
        alpha = self.param("position", nn.initializers.constant(self.kind.first), (), self.dtype)
        return self.kind.slope(alpha.astype(jnp.float32))

    def _of_token(self, name: str, projected: Array, x: Array) -> Array:
        """tanh(f(x)), f32 [B, T]; projected [B, T, heads, H]."""
        shared = self.kind.features == "projections"
        features = (jax.nn.gelu(projected, approximate=False) if shared else x).astype(jnp.float32)
        axes = tuple(range(2, features.ndim))
        weight = self.param(name, nn.initializers.zeros, features.shape[2:], self.dtype)
        return jnp.tanh(jnp.sum(features * weight.astype(jnp.float32), axis=axes))


def _scaled(x: Array, factor: Array) -> Array:
    """[B, T, heads, H] times [B, T], in the dtype of x."""
    return (x.astype(jnp.float32) * factor[..., None, None]).astype(x.dtype)
