"""Multi-head latent attention (MLA; DeepSeek-V2, 2024, arXiv 2405.04434, section 2.1)."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from kvjax.attention.base import AttentionConfig, AttentionKind, AttentionModule, CacheShape, LayerCacheProtocol
from kvjax.attention.norm import RMSNorm
from kvjax.attention.projection import Projection
from kvjax.cache.step import Latent
from kvjax.errors import UsageError
from kvjax.typing import Array
from pallas_kernels.rope import Rope


@dataclasses.dataclass(frozen=True)
class MultiHeadLatent(AttentionKind):
    """A token is cached as one latent c and one rotary key r for all heads; each head makes keys and values of c.

        c = norm(W_c x),   r = RoPE(W_r x),   [q_n; p_n] = W_n norm(W_d x), or W_n x without a query latent,
        logit_n = scale_factor (H + C) ** -0.5 · (q_n · U_n c + RoPE(p_n) · r),   out_n = V_n · (attention over c).

    H is the model's `head_dim` and C `rotary_key_dim`. A cache stores latent_dim + C numbers per token where multi-head
    attention stores 2 · N · H: 1/57 of that in DeepSeek-V2, which has N = H = 128, latent_dim 512 and C 64. It stores
    c after its norm. Caches absorb U_n into the query and V_n into the output (`Step.latent`); an exact prompt makes
    keys and values of its own for every head, which is less work where there are as many queries as keys.

    Every head makes keys and values of its own, so the model's `num_kv_heads` is N. Its `qkv_bias` is that of W_c, W_r
    and the first map of queries.

    Attributes:
      latent_dim: channels of c, which are the values that a cache sees.
      rotary_key_dim: channels of r, the keys that a cache sees; all of them are rotated.
      query_dim: channels of the query latent; None projects queries from the layer's input.
      value_dim: channels of a head's values; None is H.
      scale_factor: multiplies logits; mscale ** 2 in YaRN models of this kind.
      normed: whether c has its norm. Without it attention is linear in c (`kvjax.convert.to_latent`).
      norm_eps: of the norms of both latents; None takes the model's.

    Raises:
      UsageError: a size or a factor that is not positive.
    """

    latent_dim: int
    rotary_key_dim: int
    query_dim: int | None = None
    value_dim: int | None = None
    scale_factor: float = 1.0
    normed: bool = True
    norm_eps: float | None = None

    def __post_init__(self) -> None:
        for name in ("latent_dim", "rotary_key_dim", "query_dim", "value_dim", "scale_factor", "norm_eps"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UsageError(f"MultiHeadLatent: {name} must be positive, got {value}.")

    def module(self, config: AttentionConfig, dtype: Any, name: str) -> nn.Module:
        return MultiHeadLatentAttention(config, dtype, self, name=name)

    def cache_shape(self, config: AttentionConfig) -> CacheShape:
        del config
        return CacheShape(1, self.rotary_key_dim, value_dim=self.latent_dim, latent=True)

    def rotary_dim(self, config: AttentionConfig) -> int:
        del config
        return self.rotary_key_dim

    def scale(self, config: AttentionConfig) -> float:
        """The factor on q·k."""
        return self.scale_factor / math.sqrt(config.head_dim + self.rotary_key_dim)

    def spelled_out(self, config: AttentionConfig) -> MultiHeadLatent:
        value_dim = config.head_dim if self.value_dim is None else self.value_dim
        eps = config.norm_eps if self.norm_eps is None else self.norm_eps
        return dataclasses.replace(self, value_dim=value_dim, norm_eps=eps)

    def check(self, config: AttentionConfig) -> None:
        """Raises UsageError where heads share keys, keys have a norm, or the model has a scale of its own."""
        if config.num_kv_heads != config.num_heads or config.kv_head_of_query is not None:
            raise UsageError(
                f"MultiHeadLatent: every query head makes keys and values of its own, so num_kv_heads is num_heads "
                f"{config.num_heads} and kv_head_of_query None; got {config.num_kv_heads} and "
                f"{config.kv_head_of_query}."
            )
        if config.qk_norm:
            raise UsageError("MultiHeadLatent: a norm of keys cannot be absorbed into queries; set qk_norm=False.")
        if config.scale != config.head_dim**-0.5:
            raise UsageError(
                "MultiHeadLatent: keys have head_dim + rotary_key_dim channels, and logits a factor that follows from "
                "that; leave attention_scale out and give MultiHeadLatent(scale_factor=...)."
            )


class MultiHeadLatentAttention(AttentionModule):
    """Projects to the latent, the rotary key and queries; what makes keys and values of latents goes with the step.

    Parameters: `latent` [D, R], `latent_norm` [R], `rotary_key` [D, C], `q` [D or query_dim, N, H + C] with `q_latent`
    [D, query_dim] and `q_latent_norm` before it, `up_keys` U [N, R, H], `up_values` V [N, R, H'] and `o` [N, H', D].

    Attributes:
      kind: the variant's settings.
    """

    kind: MultiHeadLatent = MultiHeadLatent(1, 2)

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
        config, kind = self.config, self.kind
        c = self._down("latent", kind.latent_dim, x)
        if kind.normed:
            c = self._latent_norm("latent_norm")(c)
        own, turned = jnp.split(self._queries(x), [config.head_dim], axis=-1)
        value_dim = config.head_dim if kind.value_dim is None else kind.value_dim
        up_keys, up_values = self._up("up_keys", config.head_dim), self._up("up_values", value_dim)
        output = self.output(config.num_heads, value_dim, x.shape[-1])
        return self.attended(
            x,
            output,
            cache,
            queries=turned,
            keys=self._down("rotary_key", kind.rotary_key_dim, x)[:, :, None],
            values=c[:, :, None],
            positions=positions,
            valid=valid,
            rope=rope,
            latent=Latent(own, up_keys, up_values),
            scale=kind.scale(config),
        )

    def _queries(self, x: Array) -> Array:
        """[B, T, N, H + C], not rotated."""
        config, kind = self.config, self.kind
        outputs = (config.num_heads, config.head_dim + kind.rotary_key_dim)
        if kind.query_dim is None:
            return Projection((x.shape[-1],), outputs, config.qkv_bias, self.dtype, name="q")(x)
        latent = self._latent_norm("q_latent_norm")(self._down("q_latent", kind.query_dim, x))
        return Projection((kind.query_dim,), outputs, dtype=self.dtype, name="q")(latent)

    def _down(self, name: str, outputs: int, x: Array) -> Array:
        """[B, T, outputs]."""
        return Projection((x.shape[-1],), (outputs,), self.config.qkv_bias, self.dtype, name=name)(x)

    def _up(self, name: str, outputs: int) -> Array:
        """A map of latents for each head, [N, R, outputs]: heads first, as absorbed queries read it."""
        rank = self.kind.latent_dim
        init = nn.initializers.truncated_normal(1.0 / math.sqrt(rank))
        return self.param(name, init, (self.config.num_heads, rank, outputs), self.dtype)

    def _latent_norm(self, name: str) -> RMSNorm:
        config, eps = self.config, self.kind.norm_eps
        return RMSNorm(config.norm_eps if eps is None else eps, config.norm_offset, self.dtype, name=name)
