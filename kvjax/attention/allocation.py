"""How many query heads each kv head serves, from how large its keys are (Khan et al., 2024, arXiv 2408.08454).

Everything here runs inside jit: counts are data, and what a program's shapes depend on is N and K alone.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from kvjax.cache.step import Step
from kvjax.errors import UsageError
from kvjax.typing import Array

Scope = Literal["example", "batch"]


@dataclasses.dataclass(frozen=True)
class KeyNorms:
    """Allots query heads by this call's keys: kv heads with large keys serve more of them (`Step.allocation`).

    m_g = |K_g|, the Frobenius norm over the valid tokens and channels of kv head g, becomes a share of the heads by
    (m_g - min m) / (max m - min m) over its sum; where all m are equal, so are the shares. Norms are of keys before
    rotary embedding, which does not change them.

    Attributes:
      per: "example", so that each row has an allocation of its own and is read the same alone and in any batch; or
        "batch", as released: norms are summed over the rows, and what a row reads depends on those beside it.
      least: query heads that every kv head serves; the shares divide the rest. 0 is as released: then the kv head with
        the smallest keys serves none, but for what rounding gives it, and what a cache holds of it is not read.
    """

    per: Scope = "example"
    least: int = 1

    def __post_init__(self) -> None:
        if self.per not in get_args(Scope):
            raise UsageError(f"KeyNorms: unknown per {self.per!r}; one of {', '.join(get_args(Scope))}.")
        if self.least < 0:
            raise UsageError(f"KeyNorms: least must not be negative, got {self.least}.")

    def head_of_query(self, step: Step) -> Array:
        """int32 [B, N], the kv head that each query head reads: in order, so the first ones read kv head 0."""
        batch, _, heads, _ = step.queries.shape
        norms = key_norms(step)
        if self.per == "batch":
            norms = norms.sum(0, keepdims=True)
        reads = contiguous(head_counts(spread(norms), heads, self.least), heads)
        return jnp.broadcast_to(reads, (batch, heads))


def key_norms(step: Step) -> Array:
    """f32 [B, K]: the Frobenius norms over valid tokens and channels of each row's keys; no gradient flows back."""
    keys = jnp.where(step.valid[:, :, None, None], jax.lax.stop_gradient(step.keys).astype(jnp.float32), 0.0)
    return jnp.sqrt(jnp.sum(jnp.square(keys), axis=(1, 3)))


def spread(norms: Array) -> Array:
    """f32 [..., K] in [0, 1]: 0 for the smallest norm and 1 for the largest; all 1 where they are equal."""
    low, high = norms.min(-1, keepdims=True), norms.max(-1, keepdims=True)
    equal = high == low
    return jnp.where(equal, 1.0, (norms - low) / jnp.where(equal, 1.0, high - low))


def head_counts(weights: Array, heads: int, least: int = 0) -> Array:
    """Query heads per kv head, in proportion to weights.

    Each gets `least`, and its share of the others rounded (halves to even). Then, until the sum is N, the first that
    has most gives one up, or the first that has least takes one.

    Args:
      weights: f32 [..., K], not negative; where all are 0, shares are equal.
      heads: N, at least `least` times K.

    Returns:
      int32 [..., K] whose sum is N.
    """
    kv_heads = weights.shape[-1]
    free = heads - least * kv_heads
    assert free >= 0, "`KeyDriven.check` refuses this"
    total = weights.sum(-1, keepdims=True)
    shares = jnp.where(total > 0, weights / jnp.where(total > 0, total, 1.0), 1 / kv_heads)
    counts = jnp.round(free * shares).astype(jnp.int32)

    def repair(_: int, counts: Array) -> Array:
        surplus = counts.sum(-1, keepdims=True) - free
        most, fewest = (
            jax.nn.one_hot(pick(counts, -1), kv_heads, dtype=jnp.int32) for pick in (jnp.argmax, jnp.argmin)
        )
        return counts - jnp.where(surplus > 0, most, 0) + jnp.where(surplus < 0, fewest, 0)

    # Each share is off by half at most, so this many repairs are enough.
    return least + jax.lax.fori_loop(0, kv_heads // 2 + 1, repair, counts)


def contiguous(counts: Array, heads: int) -> Array:
    """int32 [..., N], the kv head of each query head: the first counts[0] of them read head 0, and so on."""
    ends = jnp.cumsum(counts, axis=-1)
    return jnp.sum(ends[..., None, :] <= jnp.arange(heads)[:, None], axis=-1, dtype=jnp.int32)
