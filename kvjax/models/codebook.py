"""Codebooks of frozen keys, found without labels by vector quantisation with moving averages.

Vector quantisation: van den Oord et al., 2017, arXiv 1711.00937, appendix A.1; several codebooks behind fixed random
projections: Träuble et al., 2023, arXiv 2207.11240. Everything is an argument and a result, nothing is trained by
gradient, and all of it is float32, whatever features are.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from kvjax.errors import UsageError
from kvjax.typing import Array

_EXACT = jax.lax.Precision.HIGHEST


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Codebooks:
    """C codebooks of J keys each, and the projections through which features meet them.

    Attributes:
      projections: f32 [C, E, d], fixed. E: channels of features.
      keys: f32 [C, J, d].
    """

    projections: Array
    keys: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Averages:
    """What keys are the quotients of while they are learnt.

    Attributes:
      counts: f32 [C, J], moving average of how many features of a batch are nearest to a key.
      sums: f32 [C, J, d], moving average of the sum of these, projected.
    """

    counts: Array
    sums: Array


def create(key: Array, features: Array, codebooks: int, pairs: int, key_dim: int) -> tuple[Codebooks, Averages]:
    """New codebooks whose keys are some of the features [n, E]: C codebooks of J pairs, keys of d channels.

    Projections are Xavier-normal, variance 2 / (E + d). No feature is taken twice by a codebook that has no more keys
    than there are features.

    Raises:
      UsageError: features of another rank, or a size below 1.
    """
    if features.ndim != 2 or min(*features.shape, codebooks, pairs, key_dim) < 1:
        raise UsageError(
            f"codebooks are made from features [n, E] and sizes of at least 1; got features {list(features.shape)}, "
            f"{codebooks} codebooks of {pairs} keys with {key_dim} channels."
        )
    for_projections, for_keys = jax.random.split(key)
    width = features.shape[1]
    scale = (2.0 / (width + key_dim)) ** 0.5
    projections = scale * jax.random.normal(for_projections, (codebooks, width, key_dim))
    keys = _take(project(projections, features), draw(for_keys, codebooks, pairs, features.shape[0]))
    return Codebooks(projections, keys), Averages(jnp.ones(keys.shape[:2]), keys)


@jax.jit
def learn(
    codebooks: Codebooks, averages: Averages, features: Array, key: Array, decay: float = 0.95, threshold: float = 0.1
) -> tuple[Codebooks, Averages]:
    """One step over a batch of features [B, E] without labels.

    With n_j the features nearest to key j and m_j their sum: counts <- decay counts + (1 - decay) n, and sums likewise
    with m; keys = sums / counts. A key whose count falls below the threshold is dead: it moves to a feature of this
    batch that is drawn for it, with the threshold as its count.
    """
    projected = project(codebooks.projections, features)
    pairs = codebooks.keys.shape[1]
    nearest_key = jax.nn.one_hot(_nearest(projected, codebooks.keys), pairs)  # [C, B, J]
    hits = nearest_key.sum(1)
    counts = decay * averages.counts + (1 - decay) * hits
    gathered = jnp.einsum("cbj,cbd->cjd", nearest_key, projected, precision=_EXACT)
    sums = decay * averages.sums + (1 - decay) * gathered
    # A key that nothing was near stays where it is: both averages shrink alike, and the quotient of tiny ones is noise.
    keys = jnp.where((hits > 0)[..., None], sums / counts[..., None], codebooks.keys)
    dead = counts < threshold
    fresh = _take(projected, draw(key, keys.shape[0], pairs, features.shape[0]))
    keys = jnp.where(dead[..., None], fresh, keys)
    counts = jnp.where(dead, threshold, counts)
    sums = jnp.where(dead[..., None], threshold * fresh, sums)
    return Codebooks(codebooks.projections, keys), Averages(counts, sums)


@jax.jit
def nearest(codebooks: Codebooks, features: Array) -> Array:
    """int32 [B, C], the key of each codebook that is nearest to features [B, E]; the first of equally near ones."""
    return _nearest(project(codebooks.projections, features), codebooks.keys).T


def project(projections: Array, features: Array) -> Array:
    """Features [B, E] as each codebook sees them, f32 [C, B, d]."""
    return jnp.einsum("be,ced->cbd", features.astype(jnp.float32), projections, precision=_EXACT)


def draw(key: Array, codebooks: int, pairs: int, n: int) -> Array:
    """int32 [C, J], for each codebook a random choice of n things, without repeats as far as they reach."""
    shuffled = jax.vmap(functools.partial(jax.random.permutation, x=n))(jax.random.split(key, codebooks))
    return shuffled[:, jnp.arange(pairs) % n]


def _take(projected: Array, index: Array) -> Array:
    return jnp.take_along_axis(projected, index[..., None], axis=1)


def _nearest(projected: Array, keys: Array) -> Array:
    """int32 [C, B] of h [C, B, d] and k [C, J, d], by |h|² - 2 h·k + |k|²; one codebook's distances at a time."""

    def one(pair: tuple[Array, Array]) -> Array:
        h, k = pair
        squares = jnp.sum(h * h, axis=1)[:, None] + jnp.sum(k * k, axis=1)
        return jnp.argmin(squares - 2 * jnp.dot(h, k.T, precision=_EXACT), axis=1).astype(jnp.int32)

    return jax.lax.map(one, (projected, keys))
