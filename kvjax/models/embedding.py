"""Token embeddings: a table that is learnt, or one that every sequence draws for itself."""

from __future__ import annotations

import dataclasses
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from kvjax.errors import UsageError
from kvjax.typing import Array

#: Tokens whose drawn embeddings are held at a time while logits are computed.
BLOCK = 1024
_DTYPES = ("float32", "bfloat16")


class Embedding(nn.Module):
    """Token embeddings [V, D], looked up on the way in and, where tied, contracted on the way out."""

    vocab_size: int
    embed_dim: int
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        init = nn.initializers.normal(0.02)
        self.embedding = self.param("embedding", init, (self.vocab_size, self.embed_dim), self.dtype)

    def __call__(self, tokens: Array, draws: Array | None = None) -> Array:
        """int32 [B, T] to [B, T, D]."""
        return jnp.take(self.embedding, tokens, axis=0, mode="clip")

    def attend(self, x: Array, draws: Array | None = None) -> Array:
        """[B, T, D] to logits f32 [B, T, V]."""
        return jnp.einsum("btd,vd->btv", x, self.embedding, preferred_element_type=jnp.float32)


@dataclasses.dataclass(frozen=True)
class DrawnEmbedding:
    """Embeddings that have no parameters: each sequence draws its own (lexinvariant model: Huang et al., 2023).

    "Lexinvariant Language Models" (arXiv 2305.16349): token w of a row has the embedding E_w ~ N(0, I / D), of length
    about 1, drawn anew for every sequence and used on the way in and out. A model of it knows a token only by how the
    sequence uses it: which number a token has changes nothing in law. The draw belongs to the cache: what is decoded
    must meet the embeddings of its prompt, and a cached prefix is of no use to a row of another draw. D channels tell V
    tokens apart up to a noise of D ** -0.5.

    Attributes:
      dtype: of the embeddings, and so of the activations.
    """

    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise UsageError(f"DrawnEmbedding: dtype is one of {', '.join(_DTYPES)}; got {self.dtype!r}")


def drawn(draw: Array, tokens: Array, embed_dim: int) -> Array:
    """f32 [n, D]: the embeddings of tokens int32 [n] in the draw that a uint32 scalar names.

    Each token has a key of its own, so that a few are drawn without the others, in any order.
    """
    key = jax.random.key(draw, impl="threefry2x32")
    keys = jax.vmap(partial(jax.random.fold_in, key))(tokens)
    return jax.vmap(lambda one: jax.random.normal(one, (embed_dim,), jnp.float32))(keys) * embed_dim**-0.5


class DrawnTable(nn.Module):
    """`Embedding` with the tables that `draws` uint32 [B] name, one per row."""

    vocab_size: int
    embed_dim: int
    dtype: str = "float32"

    def __call__(self, tokens: Array, draws: Array | None = None) -> Array:
        """int32 [B, T] to [B, T, D]."""
        assert draws is not None
        known = jnp.clip(tokens, 0, self.vocab_size - 1)
        return jax.vmap(lambda draw, row: drawn(draw, row, self.embed_dim))(draws, known).astype(self.dtype)

    def attend(self, x: Array, draws: Array | None = None) -> Array:
        """[B, T, D] to logits f32 [B, T, V]; the rows of a table are drawn block by block, in both directions."""
        assert draws is not None
        size = min(BLOCK, self.vocab_size)
        tokens = jnp.arange(-(-self.vocab_size // size) * size, dtype=jnp.int32).reshape(-1, size)

        @jax.checkpoint
        def block(mine: Array) -> Array:
            table = jax.vmap(lambda draw: drawn(draw, mine, self.embed_dim))(draws).astype(self.dtype)
            return jnp.einsum("btd,bvd->btv", x, table, preferred_element_type=jnp.float32)

        logits = jnp.moveaxis(jax.lax.map(block, tokens), 0, 2)
        return logits.reshape(*x.shape[:2], -1)[..., : self.vocab_size]
