"""`VisionConfig`: every number and choice that defines an image classifier, frozen and hashable."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

from kvjax.attention import AttentionConfig, AttentionKind, GroupedQuery
from kvjax.errors import UsageError
from kvjax.models.config import Activation

Pool = Literal["mean", "class token"]


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """A pre-norm vision transformer (ViT: Dosovitskiy et al., 2020, arXiv 2010.11929).

    Attributes:
      image_size, patch_size, channels: pixels of a side of an image and of a patch, and C.
      num_classes: of images.
      embed_dim, num_layers, num_heads, num_kv_heads, head_dim, mlp_dim: D, L, N, K, H, F. N·H need not be D.
      mixer: what mixes tokens, a kind of attention or of what stands in its place; it sees all tokens, before and
        behind.
      pool: what the classifier reads: the mean over tokens, or a class token in front of them.
      qkv_bias, output_bias, mlp_bias: biases of the projections.
      qk_norm: RMS norm of queries and keys over the head dimension.
      norm_eps: added to the variance in every norm.
      activation: of the MLPs.

    Raises:
      UsageError: sizes that do not fit together, naming the field and the fix.
    """

    image_size: int
    patch_size: int
    num_classes: int
    embed_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    channels: int = 3
    mixer: AttentionKind = GroupedQuery()
    pool: Pool = "mean"
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    norm_eps: float = 1e-6
    activation: Activation = "gelu"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if field.type == "int" and getattr(self, field.name) < 1:
                raise UsageError(f"{field.name} must be at least 1, got {getattr(self, field.name)}.")
        for name, words in (("pool", Pool), ("activation", Activation)):
            if getattr(self, name) not in get_args(words):
                raise UsageError(f"unknown {name} {getattr(self, name)!r}; one of {', '.join(get_args(words))}.")
        if self.image_size % self.patch_size:
            raise UsageError(
                f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}: patches would not "
                "cover the image."
            )
        if self.num_heads % self.num_kv_heads:
            raise UsageError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}.")
        for layer in range(self.num_layers):
            self.mixer.check(self.attention_config(layer))

    @property
    def tokens(self) -> int:
        """T: patches of an image, and the class token."""
        return (self.image_size // self.patch_size) ** 2 + (self.pool == "class token")

    def attention_config(self, layer: int) -> AttentionConfig:
        """What the mixer of `layer` is told."""
        return AttentionConfig(
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            scale=self.head_dim**-0.5,
            qkv_bias=self.qkv_bias,
            output_bias=self.output_bias,
            qk_norm=self.qk_norm,
            norm_eps=self.norm_eps,
            layer=layer,
            layers=self.num_layers,
        )
