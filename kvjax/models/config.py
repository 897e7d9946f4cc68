"""`TransformerConfig`: every number and choice that defines a decoder, frozen and hashable."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

from kvjax.attention.rope import RopeConfig
from kvjax.errors import UsageError

__all__ = ["Activation", "RopeConfig", "TransformerConfig"]

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]


_PLAIN_ROPE = RopeConfig()


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """A pre-norm decoder with gated MLPs: Llama, Mistral, Qwen and Gemma are values of it.

    Attributes:
      vocab_size, embed_dim, num_layers, num_heads, num_kv_heads, head_dim, mlp_dim: V, D, L, N, K, H, F.
      max_positions: the context length the model was made for.
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
        if self.head_dim % 2 and self.rope is not None:
            raise UsageError(f"head_dim {self.head_dim} is odd, but rotary embedding turns pairs of channels.")
        self._check_windows()
        self._check_heads()

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

    @property
    def scale(self) -> float:
        """The factor on q·k."""
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
