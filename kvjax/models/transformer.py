"""The decoder: one code path for training, prefill and decode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import ArrayLike

from kvjax.attention.norm import RMSNorm
from kvjax.attention.projection import Projection
from kvjax.cache.shared import Sharing
from kvjax.models.config import RopeConfig, TransformerConfig
from kvjax.models.embedding import DrawnTable, Embedding
from kvjax.models.inputs import check_draws, check_inputs
from kvjax.models.layers import DecoderLayer
from kvjax.typing import Array
from pallas_kernels.rope import Rope


class Transformer(nn.Module):
    """Tokens to logits. Activations take the dtype of the embedding table; norms, softmax and logits are float32.

    Attributes:
      config: sizes and choices.
      dtype: of the parameters that `init` makes.
    """

    config: TransformerConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        config = self.config
        self.embed = (
            Embedding(config.vocab_size, config.embed_dim, self.dtype)
            if config.embedding is None
            else DrawnTable(config.vocab_size, config.embed_dim, config.embedding.dtype)
        )
        self.layers = [DecoderLayer(config, index, self.dtype) for index in range(config.num_layers)]
        self.final_norm = RMSNorm(config.norm_eps, config.norm_offset, self.dtype)
        if not config.tied_embeddings:
            self.head = Projection((config.embed_dim,), (config.vocab_size,), dtype=self.dtype)

    def __call__(
        self,
        tokens: Array,
        positions: Array | None = None,
        cache: Sequence[Any] | None = None,
        valid: Array | None = None,
        logits_at: Array | None = None,
        draws: Array | None = None,
    ) -> tuple[Array, tuple[Any, ...] | None]:
        """Runs T tokens of each row.

        Args:
          tokens: int32 [B, T], padded on the right.
          positions: int32 [B, T]; by default they go on from the cache's length, or start at 0.
          cache: one layer cache per layer that has keys and values of its own (all, but for `kv_layers`), or None for
            attention among these tokens alone.
          valid: bool [B, T], False on padding; all True by default.
          logits_at: int32 [B], the only index of each row whose logits are wanted.
          draws: uint32 [B], which draw of the embeddings each row has; for a model whose embeddings are drawn.

        Returns:
          logits f32 [B, T, V] ([B, 1, V] with `logits_at`), and the next cache (None without one).

        Raises:
          UsageError: an argument of another shape or dtype; found while tracing.
        """
        check_inputs(len(self.config.owners), tokens, positions, cache, valid, logits_at)
        check_draws(self.config.embedding is not None, tokens, draws)
        states, layer_caches = self._run(tokens, positions, cache, valid, draws)
        x = states[-1]
        if logits_at is not None:
            x = jnp.take_along_axis(x, logits_at[:, None, None], axis=1)
        return self.read_out(x, draws), layer_caches

    def states(self, tokens: Array, valid: Array | None = None, draws: Array | None = None) -> tuple[Array, ...]:
        """The residual stream behind each of the L layers, [B, T, D] each; arguments and errors as of `__call__`."""
        check_inputs(len(self.config.owners), tokens, None, None, valid, None)
        check_draws(self.config.embedding is not None, tokens, draws)
        return self._run(tokens, None, None, valid, draws)[0]

    def read_out(self, x: Array, draws: Array | None = None, width: ArrayLike | None = None) -> Array:
        """Logits f32 [B, T, V] of a residual stream [B, T, D], of any layer.

        width: int32, may be traced: how many of the first channels of the normed stream are read; None means D.
        """
        config = self.config
        x = self.final_norm(x)
        if width is not None:
            x = jnp.where(jnp.arange(x.shape[-1]) < width, x, 0)
        logits = self.embed.attend(x, draws) if config.tied_embeddings else self.head(x, out_dtype=jnp.float32)
        cap = config.logit_softcap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def _run(
        self,
        tokens: Array,
        positions: Array | None,
        cache: Sequence[Any] | None,
        valid: Array | None,
        draws: Array | None,
    ) -> tuple[tuple[Array, ...], tuple[Any, ...] | None]:
        """The residual stream behind each layer, and the next cache."""
        config = self.config
        positions = _positions(tokens, cache) if positions is None else positions
        valid = jnp.ones(tokens.shape, bool) if valid is None else valid
        ropes = self._ropes(jnp.max(jnp.where(valid, positions, 0)) + 1)

        x = self.embed(tokens, draws)
        if config.embed_scale != 1.0:
            x = x * jnp.asarray(config.embed_scale, x.dtype)
        held = dict(zip(config.owners, cache or (None,) * len(config.owners), strict=True))
        if config.kv_layers:
            held = {owner: Sharing(one) for owner, one in held.items()}
        states = []
        for index, layer in enumerate(self.layers):
            owner = config.owner_of(index)
            x, held[owner] = layer(
                x, positions=positions, valid=valid, rope=ropes[config.rope_of(index)], cache=held[owner]
            )
            states.append(x)
        layer_caches = [one.close() if config.kv_layers else one for one in held.values()]
        return tuple(states), None if cache is None else tuple(layer_caches)

    def _ropes(self, length: Array) -> dict[RopeConfig | None, Rope | None]:
        """One table per distinct rotary embedding of the layers."""
        kinds = {self.config.rope_of(index) for index in range(self.config.num_layers)}
        turned = self.config.attention.rotary_dim(self.config.attention_config(0))
        return {kind: None if kind is None else kind.table(turned, length) for kind in kinds}


def _positions(tokens: Array, cache: Sequence[Any] | None) -> Array:
    """int32 [B, T]: counted from each row's length in the cache."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    return positions if cache is None else positions + cache[0].length[:, None]
