"""`LanguageModel`: a config, its parameters and its tokenizer, as one value that jit accepts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from kvjax.models.config import TransformerConfig
from kvjax.models.tokenizer import Tokenizer
from kvjax.models.transformer import Transformer
from kvjax.sharding import ShardingRules, param_specs, place
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
      mesh: the devices that the parameters are spread over, and on which `generate` then runs; None is one device.
      rules: which axes go where on the mesh.
    """

    config: TransformerConfig = dataclasses.field(metadata={"static": True})
    params: PyTree
    tokenizer: Tokenizer = dataclasses.field(default=Tokenizer(), metadata={"static": True})
    name: str = dataclasses.field(default="model", metadata={"static": True})
    mesh: Mesh | None = dataclasses.field(default=None, metadata={"static": True})
    rules: ShardingRules = dataclasses.field(default=ShardingRules(), metadata={"static": True})

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
        draws: Array | None = None,
    ) -> tuple[Array, tuple[Any, ...] | None]:
        """`Transformer.__call__` with these parameters: tokens int32 [B, T] to (logits f32 [B, T, V], cache)."""
        return self.module.apply({"params": self.params}, tokens, positions, cache, valid, logits_at, draws)  # pyright: ignore[reportReturnType]

    def on_mesh(self, mesh: Mesh, rules: ShardingRules = ShardingRules()) -> LanguageModel:
        """This model with its parameters spread over a mesh (`kvjax.sharding.make_mesh`); rows and caches follow."""
        params = place(self.params, param_specs(self.params, mesh, rules), mesh)
        return dataclasses.replace(self, params=params, mesh=mesh, rules=rules)

    def place_rows(self, x: Any) -> Array:
        """An array [B, ...] on the devices that work on its rows."""
        if self.mesh is None:
            return jnp.asarray(x)
        return place(x, P(self.rules.axis("batch", x.shape[0], self.mesh)), self.mesh)

    @property
    def num_params(self) -> int:
        """Number of parameters (a tied head is counted once)."""
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.params))

    @property
    def dtype(self) -> Any:
        """The dtype of the embeddings, which is that of the activations."""
        if self.config.embedding is not None:
            return jnp.dtype(self.config.embedding.dtype)
        return self.params["embed"]["embedding"].dtype
