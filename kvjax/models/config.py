"""`TransformerConfig`: every number and choice that defines a decoder, frozen and hashable."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

from kvjax.attention import AttentionConfig, AttentionKind, CacheShape, GroupedQuery, SharedKeyValues
from kvjax.attention.rope import RopeConfig
from kvjax.errors import UsageError
from kvjax.models.embedding import DrawnEmbedding

__all__ = ["Activation", "RopeConfig", "TransformerConfig"]

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]


_PLAIN_ROPE = RopeConfig()
_SHARED = SharedKeyValues()


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """A pre-norm decoder with gated MLPs: Llama, Mistral, Qwen and Gemma are values of it.

    Attributes:
      vocab_size, embed_dim, num_layers, num_heads, num_kv_heads, head_dim, mlp_dim: V, D, L, N, K, H, F.
      max_positions: the context length the model was made for.
      attention: the variant of attention (`kvjax.attention`).
      kv_layers: for each layer the layer whose keys and values it reads: itself, or an earlier one that reads its own
        (cross-layer sharing: Brandon et al., 2024, arXiv 2405.12981); () means that every layer has its own.
      rope: rotary embedding, or None for no position signal.
      local_rope: rotary embedding of the layers that have a window; None means `rope`.
      windows: sliding window in tokens per layer (None = full attention); () means no layer has one.
      kv_head_of_query: for each query head the kv head it reads; None means n // (N / K).
      attention_scale: multiplies q·k; None means H ** -0.5.
      attention_softcap, logit_softcap: x becomes cap * tanh(x / cap); None means no cap.
      qkv_bias, output_bias, mlp_bias: biases of the projections.
      qk_norm: RMS norm of queries and keys over the head dimension.
      norm_eps: added to the mean square in every norm.
      norm_offset: 1 where norms multiply by 1 + scale (Gemma), else 0.
      sandwich_norm: a second norm on the output of attention and MLP, before the residual sum (Gemma 2, 3).
      activation: of the gate.
      embed_scale: multiplies the embeddings (Gemma: sqrt(D)).
      tied_embeddings: the output head is the transposed embedding.
      embedding: None is a table that is learnt; else each row draws its own (`kvjax.models.embedding`), tied.

    Raises:
      UsageError: sizes that do not fit together, naming the field and the fix.
    """

    vocab_size: int
    embed_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    max_positions: int
    attention: AttentionKind = GroupedQuery()
    kv_layers: tuple[int, ...] = ()
    rope: RopeConfig | None = _PLAIN_ROPE
    local_rope: RopeConfig | None = None
    windows: tuple[int | None, ...] = ()
    kv_head_of_query: tuple[int, ...] | None = None
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    norm_eps: float = 1e-6
    norm_offset: float = 0.0
    sandwich_norm: bool = False
    activation: Activation = "silu"
    embed_scale: float = 1.0
    tied_embeddings: bool = False
    embedding: DrawnEmbedding | None = None

    def __post_init__(self) -> None:
        for name in _SIZES:
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("attention_scale", "attention_softcap", "logit_softcap"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UsageError(f"{name} must be positive or None, got {value}.")
        if self.activation not in get_args(Activation):
            raise UsageError(f"unknown activation {self.activation!r}; one of {', '.join(get_args(Activation))}.")
        if self.embedding is not None and not self.tied_embeddings:
            raise UsageError("embeddings that each row draws are used on the way out too: set tied_embeddings=True.")
        self._check_windows()
        self._check_heads()
        self._check_kv_layers()
        for layer in range(self.num_layers):
            sizes = self.attention_config(layer)
            self.attention.check(sizes)
            turned = self.attention.rotary_dim(sizes)
            if turned % 2 and self.rope is not None:
                raise UsageError(f"head_dim {turned} is odd, but rotary embedding turns pairs of channels.")

    def _check_windows(self) -> None:
        if self.windows and len(self.windows) != self.num_layers:
            raise UsageError(
                f"windows has {len(self.windows)} entries for {self.num_layers} layers; give one per layer."
            )
        if any(window is not None and window < 1 for window in self.windows):
            raise UsageError(f"every window must be at least 1 token or None, got {self.windows}.")

    def _check_heads(self) -> None:
        if self.kv_head_of_query is None:
            if self.num_heads % self.num_kv_heads:
                raise UsageError(
                    f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}; "
                    "give kv_head_of_query for groups of unequal size."
                )
            return
        if len(self.kv_head_of_query) != self.num_heads:
            raise UsageError(
                f"kv_head_of_query has {len(self.kv_head_of_query)} entries for {self.num_heads} query heads."
            )
        if not all(0 <= head < self.num_kv_heads for head in self.kv_head_of_query):
            raise UsageError(
                f"kv_head_of_query {self.kv_head_of_query} names a head outside 0..{self.num_kv_heads - 1}."
            )

    def _check_kv_layers(self) -> None:
        if not self.kv_layers:
            return
        if len(self.kv_layers) != self.num_layers:
            raise UsageError(
                f"kv_layers has {len(self.kv_layers)} entries for {self.num_layers} layers; give one each."
            )
        for layer, owner in enumerate(self.kv_layers):
            if not 0 <= owner <= layer or self.kv_layers[owner] != owner:
                raise UsageError(
                    f"kv_layers {self.kv_layers}: layer {layer} reads the keys and values of {owner}, which must be "
                    "the layer itself or an earlier one that reads its own."
                )
            if owner != layer and not self.attention.shares_layers:
                kind = type(self.attention).__name__
                raise UsageError(
                    f"kv_layers: layers cannot share the keys and values of {kind}; use grouped-query attention."
                )
            if self.window_of(layer) != self.window_of(owner):
                raise UsageError(
                    f"kv_layers: layer {layer} has another window than layer {owner}, whose cache it reads."
                )

    @property
    def owners(self) -> tuple[int, ...]:
        """The layers that have keys and values, and so a cache, of their own."""
        return tuple(layer for layer in range(self.num_layers) if self.owner_of(layer) == layer)

    def owner_of(self, layer: int) -> int:
        """The layer whose keys and values `layer` reads."""
        return self.kv_layers[layer] if self.kv_layers else layer

    def attention_of(self, layer: int) -> AttentionKind:
        """What makes the attention of `layer`."""
        return self.attention if self.owner_of(layer) == layer else _SHARED

    def attention_config(self, layer: int) -> AttentionConfig:
        """What the attention of `layer` is told."""
        return AttentionConfig(
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            scale=self.scale,
            window=self.window_of(layer),
            softcap=self.attention_softcap,
            kv_head_of_query=self.kv_head_of_query,
            qkv_bias=self.qkv_bias,
            output_bias=self.output_bias,
            qk_norm=self.qk_norm,
            norm_eps=self.norm_eps,
            norm_offset=self.norm_offset,
            layer=layer,
            layers=self.num_layers,
        )

    def cache_shape(self, layer: int) -> CacheShape:
        """What the cache of `layer` holds."""
        return self.attention.cache_shape(self.attention_config(layer))

    @property
    def scale(self) -> float:
        """The factor on q·k of grouped-query attention; variants may have one of their own."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

    def window_of(self, layer: int) -> int | None:
        """The sliding window of `layer` in tokens, or None."""
        return self.windows[layer] if self.windows else None

    def rope_of(self, layer: int) -> RopeConfig | None:
        """The rotary embedding of `layer`."""
        local = self.window_of(layer) is not None and self.local_rope is not None
        return self.local_rope if local else self.rope


_SIZES = (
    "vocab_size",
    "embed_dim",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "mlp_dim",
    "max_positions",
)
