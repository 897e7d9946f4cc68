"""How the XLA forms cut the queries, and the logits of one block."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from pallas_kernels.logits import cap, finite_max, log_sum, visible

MAX_SPANS = 4
"""Every span is compiled. Four compute 5/8 of the square; eight compute 9/16 of it and compile 1.5 times as long."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """How T queries are cut, and the static parameters of a logit. `tokens` is a multiple of `block`."""

    tokens: int
    block: int
    window: int | None
    softcap: float | None

    def spans(self) -> Iterator[tuple[int, int, int]]:
        """(first query, one past the last query, first key that any of them sees)."""
        blocks = self.tokens // self.block
        width = -(-blocks // MAX_SPANS) * self.block
        for start in range(0, self.tokens, width):
            first_key = 0 if self.window is None else max(0, start - self.window + 1)
            yield start, min(self.tokens, start + width), first_key

    def starts(self, start: int, end: int) -> jax.Array:
        """The first query of every block of a span."""
        return jnp.arange(start, end, self.block)

    def split(self, x: jax.Array) -> jax.Array:
        """[G, n * block, ...] -> [n, G, block, ...]."""
        groups, length, *rest = x.shape
        return jnp.moveaxis(x.reshape(groups, length // self.block, self.block, *rest), 1, 0)

    def join(self, x: jax.Array) -> jax.Array:
        """Inverse of `split`."""
        count, groups, block, *rest = x.shape
        return jnp.moveaxis(x, 0, 1).reshape(groups, count * block, *rest)

    def mask(self, seen: jax.Array, first_query: jax.Array, first_key: int) -> jax.Array:
        """Which of the keys (`seen` [S] says which are valid) each query of a block sees: bool [block, S]."""
        query_positions = first_query + jnp.arange(self.block)
        key_positions = first_key + jnp.arange(seen.shape[0])
        return visible(query_positions, key_positions, self.window) & seen

    def capped(self, q: jax.Array, k: jax.Array) -> jax.Array:
        """Logits [G, block, S] of scaled queries [G, block, H] and keys [S, H], before temperature and mask."""
        return cap(jnp.einsum("gth,sh->gts", q, k), self.softcap)


def heated(logits: jax.Array, temperature: jax.Array | None) -> jax.Array:
    """Logits [G, block, S] times the temperature [G, block] of their query."""
    return logits if temperature is None else logits * temperature[..., None]


def attend(logits: jax.Array, values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Masked logits [G, block, S] and values [S, H] -> out [G, block, H], lse [G, block]."""
    top = finite_max(logits)
    weights = jnp.exp(logits - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = jnp.einsum("gts,sh->gth", weights, values) / jnp.where(total == 0, 1.0, total)
    return out, log_sum(total, top)[..., 0]


def finish(outs: list[jax.Array], lses: list[jax.Array], seen: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Joins the spans. A padded query still sees the keys before it; what it computes is no result."""
    out, lse = jnp.concatenate(outs, axis=1), jnp.concatenate(lses, axis=1)
    return jnp.where(seen[:, None], out, 0.0), jnp.where(seen, lse, -jnp.inf)
