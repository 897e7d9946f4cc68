"""One decoder layer of a size, with random weights: what a prompt costs in it, and what its attention hands to a cache.

Layers are alike, so one stands for all of a model. Rows do not know of each other: a prompt is timed one row at a time.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from kvjax.cache.head_split import AnyLayer, empty_layer
from kvjax.cache.layer_cache import LayerData, blank_data
from kvjax.cache.layout import CacheDims
from kvjax.cache.method import CacheMethod
from kvjax.cache.prompt import attend_prompt
from kvjax.cache.recorder import PromptRecorder, RecordedPrompt
from kvjax.cache.step import Step
from kvjax.models.config import TransformerConfig
from kvjax.models.layers import DecoderLayer
from kvjax.typing import Array, PyTree


@dataclasses.dataclass(frozen=True)
class Setting:
    """Sizes of the model and of its use.

    Attributes:
      batch: rows B. context: tokens T of every row's prompt.
      query_heads, kv_heads, head_dim, width, mlp: N, K, H, D, F.
      layers: L, which some budgets depend on; the first one is measured.
      reserve: tokens that are decoded.
    """

    batch: int
    context: int
    query_heads: int
    kv_heads: int
    head_dim: int
    width: int
    mlp: int
    layers: int
    reserve: int

    @property
    def config(self) -> TransformerConfig:
        return TransformerConfig(
            vocab_size=2,
            embed_dim=self.width,
            num_layers=self.layers,
            num_heads=self.query_heads,
            num_kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            mlp_dim=self.mlp,
            max_positions=self.context + self.reserve,
        )

    @property
    def dims(self) -> CacheDims:
        """Of the first layer's cache, whose exact tokens are bfloat16."""
        return CacheDims(
            batch=self.batch,
            kv_heads=self.kv_heads,
            query_heads=self.query_heads,
            head_dim=self.head_dim,
            max_length=self.context + self.reserve,
            prompt_length=self.context,
            width=self.width,
            layers=self.layers,
        )

    @property
    def module(self) -> DecoderLayer:
        return DecoderLayer(self.config, 0)

    def weights(self) -> PyTree:
        """The layer's parameters, f32, random."""
        x = jnp.zeros((1, 1, self.width))
        return jax.jit(lambda key: self._apply(key, x, "init"))(jax.random.key(0))["params"]

    def rows(self) -> Array:
        """Random inputs of the layer, f32 [B, T, D]."""
        return jax.random.normal(jax.random.key(1), (self.batch, self.context, self.width))

    def prompt(self, params: PyTree, rows: Array) -> tuple[Array, RecordedPrompt]:
        """An exact pass of the whole layer over rows [b, T, D]: its output, and what attention was handed."""
        return self._apply({"params": params}, rows, "apply")

    def record(self, params: PyTree, rows: Array) -> RecordedPrompt:
        """What attention was handed."""
        return self.prompt(params, rows)[1]

    def attention(self, recorded: RecordedPrompt) -> tuple[Array, Array]:
        """The part of `prompt` that is attention."""
        return attend_prompt(recorded.step)

    def compress(self, method: CacheMethod, recorded: RecordedPrompt, data: LayerData) -> AnyLayer:
        """The cache that a method makes of the prompts of B rows."""
        lengths = jnp.full((self.batch,), self.context, jnp.int32)
        return empty_layer(method, self.dims, lengths, data).absorb_prompt(recorded.step, recorded.log_sum_exp)

    def decode(self, cache: AnyLayer, token: Step) -> tuple[Array, AnyLayer]:
        """Attends one token to the cache, and caches it."""
        return cache.step(dataclasses.replace(token, positions=cache.length[:, None]))

    def token(self, params: PyTree) -> Step:
        """The step of a random token for each row."""
        recorded = self.record(params, self.rows()[:, :1])
        return dataclasses.replace(recorded.step, valid=jnp.ones((self.batch, 1), bool))

    def _apply(self, variables: PyTree, rows: Array, name: str) -> PyTree:
        batch, tokens, _ = rows.shape
        rope = self.config.rope
        assert rope is not None
        return getattr(self.module, name)(
            variables,
            rows,
            positions=jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32), (batch, tokens)),
            valid=jnp.ones((batch, tokens), bool),
            rope=rope.table(self.head_dim, jnp.int32(tokens)),
            cache=PromptRecorder(jnp.zeros((batch,), jnp.int32)),
        )


def rising_data(method: CacheMethod, dims: CacheDims) -> LayerData:
    """In place of what calibration finds: numbers of the right shapes that rise from -1 to 1 along the last axis."""

    def rising(leaf: Array) -> Array:
        return jnp.broadcast_to(jnp.linspace(-1, 1, leaf.shape[-1], dtype=leaf.dtype), leaf.shape) + 0.0

    return jax.tree.map(rising, blank_data(method, dims))
