"""FFNified attention (MetaMixer: Yun et al., 2024, arXiv 2406.02021): queries meet keys and values by convolution.

    out = value * gelu(key * query(x))

`query` is linear, D to D (a convolution of width 1); `key` and `value` are depthwise convolutions, so each channel is
one key whose pattern is looked for at every place, and one value that is written around it; GELU stands where softmax
does. There are no heads and no output projection: what a config says of heads, rotary embedding and the scale is not
used, and order is known by place. The norm before the mixer and the sum after it are the layer's, as for any attention.
The parallel smaller kernels that the authors train with at k = 7 add up to one kernel, which is what stands here.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from kvjax.attention.base import AttentionConfig, AttentionKind, AttentionModule, CacheShape, LayerCacheProtocol
from kvjax.attention.convolution import Depthwise, slide
from kvjax.attention.projection import Projection
from kvjax.cache.convolution_state import ConvolutionState
from kvjax.errors import UsageError
from kvjax.typing import Array
from pallas_kernels.rope import Rope

_UNUSED = ("window", "softcap", "kv_head_of_query", "qk_norm", "qkv_bias", "output_bias")


@dataclasses.dataclass(frozen=True)
class FFNified(AttentionKind):
    """For decoders: both convolutions read a token and the kernel - 1 before it.

    There is no KV cache. What stands in its place is a `ConvolutionState` per layer, of a size that does not grow, so
    methods other than `full` are refused: they have nothing to keep here. Without the engine:

        states = tuple(config.attention.state(batch, config.embed_dim) for _ in range(config.num_layers))
        logits, states = Transformer(config).apply({"params": params}, tokens, cache=states)

    Attributes:
      kernel: k, tokens that each convolution reads.
      use_bias: of the three maps.
    """

    kernel: int = 7
    use_bias: bool = True

    def module(self, config: AttentionConfig, dtype: Any, name: str) -> nn.Module:
        return FFNifiedAttention(config, dtype, self, name=name)

    def cache_shape(self, config: AttentionConfig) -> CacheShape:
        return CacheShape(kv_heads=0, head_dim=0, convolved=self.kernel - 1)

    def check(self, config: AttentionConfig) -> None:
        _check(self, self.kernel, config)

    def state(self, batch: int, width: int, dtype: Any = jnp.float32) -> ConvolutionState:
        """What one layer keeps of rows that have seen nothing; width is D, dtype that of the parameters."""
        return ConvolutionState.alone(batch, self.kernel - 1, width, dtype)


@dataclasses.dataclass(frozen=True)
class FFNifiedGrid(AttentionKind):
    """For image encoders: both convolutions read a square around each token, which sees what is after it too.

    Tokens are a square grid, row by row. Class tokens have no place on it: each reads the mean over the grid, which is
    what the authors' networks, without such tokens, give to their classifier.

    Attributes:
      kernel: k, odd: each convolution reads k x k tokens, and zeros beyond the edges.
      class_tokens: how many come before the grid's.
      use_bias: of the three maps.
    """

    kernel: int = 7
    class_tokens: int = 0
    use_bias: bool = True

    def module(self, config: AttentionConfig, dtype: Any, name: str) -> nn.Module:
        return FFNifiedGridAttention(config, dtype, self, name=name)

    def cache_shape(self, config: AttentionConfig) -> CacheShape:
        raise UsageError("FFNifiedGrid attention sees all tokens of an image at once, so nothing is kept of it.")

    @property
    def sees_both_ways(self) -> bool:
        return True

    def check(self, config: AttentionConfig) -> None:
        _check(self, self.kernel, config)
        if self.kernel % 2 == 0 or self.class_tokens < 0:
            raise UsageError(
                f"FFNifiedGrid: kernel must be odd, so that it has a centre, and class_tokens at least 0; got "
                f"{self.kernel} and {self.class_tokens}."
            )


class FFNifiedAttention(AttentionModule):
    """The mixer of one decoder layer.

    Attributes:
      kind: its settings.
    """

    kind: FFNified = FFNified()

    @nn.compact
    def __call__(
        self,
        x: Array,
        *,
        positions: Array,
        valid: Array,
        rope: Rope | None,
        cache: LayerCacheProtocol | ConvolutionState | None = None,
    ) -> tuple[Array, ConvolutionState | None]:
        """As `AttentionModule.__call__`; cache: a `ConvolutionState`, or None for rows that have seen nothing.

        Raises:
          UsageError: another kind of cache.
        """
        del positions, rope  # order is known by place
        kind, (batch, _, width) = self.kind, x.shape
        before = kind.state(batch, width, x.dtype) if cache is None else _as_state(cache, kind, width)
        counts = jnp.sum(valid, axis=1, dtype=jnp.int32)
        query, key, value = _maps(self, (kind.kernel,), width)
        inputs, queries = slide(before.queries, query(_present(x, valid)), counts)
        coefficients = jax.nn.gelu(key(inputs), approximate=False)
        inputs, coefficients = slide(before.coefficients, coefficients, counts)
        later = {"queries": queries, "coefficients": coefficients, "length": before.length + counts}
        after = None if cache is None else dataclasses.replace(before, **later)
        return value(inputs), after


class FFNifiedGridAttention(AttentionModule):
    """The mixer of one layer of an image encoder.

    Attributes:
      kind: its settings.
    """

    kind: FFNifiedGrid = FFNifiedGrid()

    @nn.compact
    def __call__(
        self,
        x: Array,
        *,
        positions: Array,
        valid: Array,
        rope: Rope | None,
        cache: LayerCacheProtocol | None = None,
    ) -> tuple[Array, None]:
        """As `AttentionModule.__call__`; tokens that are not valid are zeros to the others, like what is off the grid.

        Raises:
          UsageError: a cache, or tokens that are no square.
        """
        del positions, rope
        if cache is not None:
            raise UsageError("FFNifiedGrid attention sees tokens in both directions, so it cannot go on from a cache.")
        kind, (batch, tokens, width) = self.kind, x.shape
        side = math.isqrt(max(0, tokens - kind.class_tokens))
        if side == 0 or side * side != tokens - kind.class_tokens:
            raise UsageError(
                f"FFNifiedGrid: {tokens} tokens are not a square grid behind {kind.class_tokens} class tokens. Fix: "
                "give an image with as many patches in a row as rows, and class_tokens as the model has them."
            )
        query, key, value = _maps(self, (kind.kernel, kind.kernel), width)

        def on_grid(y: Array) -> Array:
            grid = _present(y, seen).reshape(batch, side, side, width)
            return jnp.pad(grid, ((0, 0), *((kind.kernel // 2,) * 2,) * 2, (0, 0)))

        seen = valid[:, kind.class_tokens :]
        queries = query(_present(x, valid)[:, kind.class_tokens :])
        coefficients = jax.nn.gelu(key(on_grid(queries)), approximate=False)
        out = value(on_grid(coefficients.reshape(queries.shape))).reshape(queries.shape)
        mean = _mean(out, seen)
        return jnp.concatenate([jnp.broadcast_to(mean, (batch, kind.class_tokens, width)), out], axis=1), None


def _maps(module: FFNifiedAttention | FFNifiedGridAttention, sizes: tuple[int, ...], width: int) -> Any:
    """Query, key and value: a projection and two convolutions."""
    bias, dtype = module.kind.use_bias, module.dtype
    query = Projection((width,), (width,), bias, dtype, name="query")
    return query, *(Depthwise(sizes, bias, dtype, name=name) for name in ("key", "value"))


def _present(x: Array, valid: Array) -> Array:
    """x [B, T, D] with zeros where valid [B, T] is False."""
    return jnp.where(valid[..., None], x, 0)


def _mean(x: Array, valid: Array) -> Array:
    """[B, 1, D], over what is valid of x [B, T, D]; summed in float32."""
    total = jnp.sum(_present(x, valid), axis=1, keepdims=True, dtype=jnp.float32)
    return (total / jnp.maximum(jnp.sum(valid, axis=1), 1)[:, None, None]).astype(x.dtype)


def _as_state(cache: Any, kind: FFNified, width: int) -> ConvolutionState:
    """Raises UsageError unless cache is the state of such a layer."""
    wanted = (kind.kernel - 1, width)
    if isinstance(cache, ConvolutionState) and cache.queries.shape[1:] == wanted:
        return cache
    found = f"one of {cache.queries.shape[1:]}" if isinstance(cache, ConvolutionState) else f"a {type(cache).__name__}"
    raise UsageError(
        f"FFNified attention keeps no keys and values: in place of a layer's cache it takes a ConvolutionState of "
        f"{wanted}, the inputs of its convolutions and their width; got {found}. Make it with "
        "config.attention.state(batch, embed_dim)."
    )


def _check(kind: AttentionKind, kernel: int, config: AttentionConfig) -> None:
    """Raises UsageError for a kernel that is none, and for what attention has and convolutions do not."""
    name = type(kind).__name__
    if kernel < 1:
        raise UsageError(f"{name}: kernel must be at least 1 token, got {kernel}.")
    if given := [field for field in _UNUSED if getattr(config, field)]:
        raise UsageError(
            f"{name} attention has no {given[0]}: it has neither softmax nor heads, reads `kernel` tokens, and its "
            "own use_bias says what has a bias. Leave the field out."
        )
