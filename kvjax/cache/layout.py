"""How many slots a layer's cache gets, and which token lives where.

Tokens flow: the first `sinks` stay for ever, new ones enter the ring `recent`, and when the ring is
full its oldest block leaves for the body. All three counts are functions of the row's length alone,
so prompt, chunk and decode agree on them without communicating.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from kvjax.typing import Array


def ceil_to(n: int, block: int) -> int:
    """The least multiple of `block` that is at least `n`, and at least 0."""
    return max(0, -(-n // block) * block)


@dataclasses.dataclass(frozen=True)
class CacheDims:
    """What a cache must know of the model and of the use, all static.

    Attributes:
      batch: rows B.
      kv_heads: K. head_dim: H. query_heads: N.
      max_length: the most tokens a row may ever see (prompt + what is decoded).
      prompt_length: the longest prompt, padded; budgets that are shares refer to a row's own length.
      dtype: what exact tokens are stored in.
      window: the layer's sliding window, or None.
      width: D, the size of a layer's input; 0 where nothing depends on it.
      layer: index of the layer, for random draws and budgets that differ between layers. layers: L.
      value_dim: channels of a value, where they are not H.
      latent: whether values are latents that keys are made of too (`Step.latent`).
      selective: whether tokens hide others (`Step.selective`); a cache then keeps a number per token seen.
      mapped: whether the head map is data (`Step.allocation`), which a cache then keeps.
      convolved: last inputs of two convolutions, of D channels, that a layer keeps in place of keys and values
        (`ConvolutionState`); it then has no kv heads. None where it keeps keys and values.
    """

    batch: int
    kv_heads: int
    query_heads: int
    head_dim: int
    max_length: int
    prompt_length: int
    dtype: str = "bfloat16"
    window: int | None = None
    width: int = 0
    layer: int = 0
    layers: int = 1
    value_dim: int | None = None
    latent: bool = False
    selective: bool = False
    mapped: bool = False
    convolved: int | None = None

    @property
    def of_values(self) -> CacheDims:
        """What a codec of values must know: H is the channels of a value."""
        if self.value_dim is None:
            return self
        return dataclasses.replace(self, head_dim=self.value_dim, value_dim=None)

    @property
    def key_width(self) -> int:
        """Channels of a key as queries meet it: latents are part of it."""
        return self.head_dim + (self.of_values.head_dim if self.latent else 0)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Slots of the three segments, in tokens; `ring`, `kept` and `body` are multiples of `block`.

    Attributes:
      block: unit of encoding and eviction (1 for per-token formats).
      sinks: first tokens, kept exactly for ever.
      ring: slots of the recent window, kept exactly; 0 means that tokens enter the body at once.
      kept: slots of the body that the prompt may fill.
      body: all slots of the body (kept + what decoding may add).
    """

    block: int
    sinks: int
    ring: int
    kept: int
    body: int


def flushed(length: Array, sinks: int, ring: Array, block: int) -> Array:
    """Tokens that have left the ring (or entered the body directly) once a row has seen `length` tokens.

    `ring` int32 [B] is what the row uses of the ring's slots, a multiple of the block.
    """
    blocks = (length - sinks - ring + block - 1) // block
    return jnp.maximum(blocks, 0) * block


def ring_slots(recent: int, block: int) -> int:
    """The smallest ring that always holds the newest `recent` tokens and gives up whole blocks."""
    if recent == 0 and block == 1:
        return 0
    return ceil_to(recent - 1, block) + block
