"""Training of the two factors of `LowRank` so that keys, or values, of sample texts are rebuilt (CSKV, section 3.3)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from kvjax.cache.codec import Identity, LowRank
from kvjax.convert.descend import descend
from kvjax.errors import UsageError
from kvjax.typing import Array, PyTree

Factors = Mapping[str, NDArray[np.float32]]
BATCH = 1024
"""Tokens per step, about."""


def reconstruction_error(codec: LowRank, factors: Factors, x: NDArray[np.float32]) -> float:
    """|x' - x|² / |x|² of x f32 [tokens, K, H] as it is rebuilt from latents that are stored as `codec` says.

    Tokens beyond whole windows do not count. As rotary embedding turns vectors without stretching them, this is the
    error of rotated keys too.
    """
    blocks = _blocks(codec, x)
    arrays = jax.tree.map(jnp.asarray, dict(factors))
    return float(jax.jit(lambda a, b: _loss(codec, a, b))(arrays, blocks) / jnp.mean(blocks**2))


def train_factors(
    codec: LowRank, factors: Factors, x: NDArray[np.float32], *, steps: int, rate: float = 3e-3, seed: int = 0
) -> dict[str, NDArray[np.float32]]:
    """Both factors after `steps` of Adam on the squared error of x f32 [tokens, K, H], window by window.

    Codes of latents are stored as `codec` says while training (quantisation-aware, gradients pass straight through
    the rounding). Where latents are exact there is nothing to gain over `principal_factors`: no factors are better.
    """
    blocks = _blocks(codec, x)
    size = max(1, BATCH // codec.block)

    def draws() -> Iterator[Array]:
        rng = np.random.default_rng(seed)
        while True:
            yield jnp.asarray(blocks[rng.integers(0, len(blocks), size)])

    power = float(np.mean(blocks**2))
    start = jax.tree.map(jnp.asarray, dict(factors))
    trained = descend(lambda params, batch: _loss(codec, params, batch) / power, start, draws(), steps, rate)
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), trained)


def _blocks(codec: LowRank, x: NDArray[np.float32]) -> NDArray[np.float32]:
    """x [tokens, K, H] as the windows that become latents together: [n, window, K, H]."""
    count = len(x) // codec.block
    if count == 0:
        raise UsageError(f"calibration needs at least a window of {codec.block} tokens; got {len(x)}")
    return np.asarray(x[: count * codec.block]).reshape(count, codec.block, *x.shape[1:])


def _loss(codec: LowRank, params: PyTree, blocks: Array) -> Array:
    latent = jnp.einsum("nskh,khr->nsr", blocks, _by_head(params), precision="highest")
    rebuilt = jnp.einsum("nsr,krh->nskh", _stored(codec, latent), params["decoder"][0], precision="highest")
    return jnp.mean((rebuilt - blocks) ** 2)


def _by_head(params: PyTree) -> Array:
    """The encoder as [K, H, r]."""
    heads, rank, dim = params["decoder"].shape[1:]
    return params["encoder"].reshape(heads, dim, rank)


def _stored(codec: LowRank, latent: Array) -> Array:
    """Latents [n, window, r] as they are read back; gradients as if they were read back exactly."""
    if codec.inner == Identity():
        return latent
    exact = jax.lax.stop_gradient(latent)
    read = codec.inner.decode(codec.inner.encode(exact[:, None]))[:, 0]
    return latent + jax.lax.stop_gradient(read - exact)
