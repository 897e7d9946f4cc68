"""`LanguageModel`: a config, its parameters and its tokenizer, as one value that jit accepts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax

from kvjax.models.config import TransformerConfig
from kvjax.models.tokenizer import Tokenizer
from kvjax.models.transformer import Transformer
from kvjax.typing import Array, PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class LanguageModel:
    """A pytree whose leaves are the parameters, so that it can be an argument of a jitted function.

    Attributes:
      config: sizes and choices.
      params: the parameter tree of `Transformer(config)`.
      tokenizer: of the folder the model came from.
      name: of that folder.
    """

    config: TransformerConfig = dataclasses.field(metadata={"static": True})
    params: PyTree
    tokenizer: Tokenizer = dataclasses.field(default=Tokenizer(), metadata={"static": True})
    name: str = dataclasses.field(default="model", metadata={"static": True})

    @property
    def module(self) -> Transformer:
        """The Linen module, a static argument of compiled functions."""
        return Transformer(self.config)

    def apply(
        self,
        tokens: Array,
        positions: Array | None = None,
        cache: Sequence[Any] | None = None,
        valid: Array | None = None,
        logits_at: Array | None = None,
    ) -> tuple[Array, tuple[Any, ...] | None]:
        """`Transformer.__call__` with these parameters: tokens int32 [B, T] to (logits f32 [B, T, V], cache)."""
        return self.module.apply({"params": self.params}, tokens, positions, cache, valid, logits_at)  # pyright: ignore[reportReturnType]

    @property
    def num_params(self) -> int:
        """Number of parameters (a tied head is counted once)."""
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.params))

    @property
    def dtype(self) -> Any:
        """The dtype of the parameters, which is that of the activations."""
        return self.params["embed"]["embedding"].dtype
