"""Grouped-query attention of one layer as latents and rotary keys: linear algebra in float64.

A kv head's key k_g has H/2 complex numbers κ_gl = k_g[l] + i k_g[l + H/2], and rotary embedding multiplies κ_gl at
position p by exp(i θ_l p), the same for all heads. So any unitary mix of *heads* commutes with it. Of each frequency l,
the m mixes of K heads that hold most of the keys' power are the shared rotary key, and with all K of them nothing is
lost. (TransMLA, Meng et al., 2025, arXiv 2502.07864, mixes heads by a real orthogonal matrix and keeps one.)

What is left of a key cannot be turned once it is part of a latent. In its logit at distance Δ, Re(conj(q) κ
exp(-iθ_l Δ)), the rotation is replaced by its mean over the distances 0 ≤ Δ < reach: nearly 1 where a frequency is
slow, and nearly 0 where it is fast. Of all constants that one has the least squared error.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Complex = NDArray[np.complexfloating[Any, Any]]


@dataclasses.dataclass(frozen=True)
class Turn:
    """What rotary embedding does: frequencies [H/2] in radians per position, and the amplitude of cos and sin."""

    frequencies: Floats
    amplitude: float

    def mean(self, reach: int) -> Complex:
        """[H/2]: the mean of amplitude² · exp(-iθΔ) over Δ = 0 .. reach - 1."""
        angles = -self.frequencies[:, None] * np.arange(reach)
        return self.amplitude**2 * np.exp(1j * angles).mean(-1)


def as_complex(x: Floats) -> Complex:
    """[..., H] to [..., H/2], channel l with channel l + H/2."""
    low, high = np.split(x, 2, axis=-1)
    return low + 1j * high


def as_real(x: Complex) -> Floats:
    """The inverse of `as_complex`."""
    return np.concatenate([x.real, x.imag], axis=-1)


def mixes(keys: Floats, moments: Floats, number: int) -> Complex:
    """[H/2, m, K]: of each frequency, orthonormal rows U; the m mixes U κ of heads that hold the most power.

    Args:
      keys: the projection [D', K, H]. moments: E[x xᵀ] of its inputs, [D', D'].
    """
    k = as_complex(keys).transpose(2, 1, 0)
    power = np.einsum("lkd,de,lje->lkj", k, moments, k.conj(), optimize=True)
    _, vectors = np.linalg.eigh(power)
    return vectors[..., ::-1][..., :number].conj().swapaxes(1, 2)


def rotary_keys(keys: Floats, mixed: Complex) -> Floats:
    """The projection to the shared rotary key [D', m H], in `as_real` layout over (mix, frequency)."""
    k = np.einsum("lmk,dkl->dml", mixed, as_complex(keys))
    return as_real(k.reshape(len(k), -1))


def rotary_queries(queries: Floats, mixed: Complex, reads: list[int]) -> Floats:
    """The projection of each query head to what meets the shared rotary key: [D', N, H] to [D', N, m H]."""
    q = np.einsum("lmn,dnl->dnml", mixed[:, :, reads], as_complex(queries))
    return as_real(q.reshape(*q.shape[:2], -1))


def rest(keys: Floats, mixed: Complex, mean: Complex) -> Floats:
    """What is left of each head's key, as it counts at no distance in particular: [D', K, H]."""
    k = as_complex(keys)
    kept = np.einsum("lmj,lmk,dkl->djl", mixed.conj(), mixed, k, optimize=True)
    return as_real(mean * (k - kept))


def joint_factors(keys: Floats, values: Floats, moments: Floats, rank: int) -> tuple[Floats, Floats, Floats]:
    """The latent of keys and values [D', K, H] that rebuilds both with the least squared error at this rank.

    Keys count as much as values altogether: before the singular values are cut they are scaled to the same power.

    Returns:
      The projection to the latent [D', R], and its maps back to each kv head's keys and values, [K, R, H] each.
    """
    heads, width = keys.shape[1:]
    powers = [np.einsum("dkh,de,ekh->", x, moments, x, optimize=True) for x in (keys, values)]
    # Nothing is left of keys where all are rotary: rounding errors must not be scaled up to values.
    weight = np.sqrt(powers[1] / powers[0]) if powers[0] > 1e-12 * powers[1] else 0.0
    both = np.concatenate([x.reshape(len(x), -1) for x in (weight * keys, values)], axis=1)
    _, vectors = np.linalg.eigh(both.T @ moments @ both)
    basis = vectors[:, ::-1][:, :rank]
    up = basis.reshape(2, heads, width, -1).swapaxes(2, 3)
    return both @ basis, up[0] / (weight or 1.0) * (weight > 0), up[1]
