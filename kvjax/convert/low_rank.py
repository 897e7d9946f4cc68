"""First factors of `LowRank` (CSKV, Wang et al., 2024, arXiv:2409.10593, section 3.2), from a layer's projection.

The paper's latent is c = x A of the layer's input x [D], and k = c B is rebuilt from it. Here the latent is made of the
key: c = k E. Nothing is lost. A = W E is what x then goes through, where W [D, K·H] is the projection with k = x W; and
because k is a linear function of x, the rank-r map of x that rebuilds k best is a rank-r map of k: its principal
directions. All factors below have this form, A = W E. A factor A that is trained as a matrix of its own can leave the
span of W only where K·H < D (grouped heads), and gains nothing there. Where W has full column rank, E belongs to its A
alone: E = pinv(W) A. The bias of a projection, if there is one, is part of k and coded with it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kvjax.errors import UsageError

Factors = dict[str, NDArray[np.float32]]
FLOOR = 1e-6
"""Added to mean magnitudes, as released, so that none is 0."""


def singular_factors(weights: ArrayLike, rank: int) -> Factors:
    """Factors of least squared error in the weights, U√Σ and √ΣVᵀ of W = UΣVᵀ cut to `rank`.

    Args:
      weights: [D, K, H], the key or the value projection of a layer.

    Returns:
      The parameters of `LowRank`: encoder [1, 1, K·H, rank] and decoder [1, K, rank, H], float32.

    Raises:
      UsageError: the rank is larger than that of any such projection.
    """
    return _factors(np.asarray(weights, np.float64), rank)


def activation_factors(weights: ArrayLike, magnitude: ArrayLike, rank: int, alpha: float = 0.5) -> Factors:
    """Factors of least squared error in the weights, each input channel weighted by what it usually is (ASVD).

    Row d of W is scaled by (magnitude_d + 1e-6)**alpha before its singular values are cut, and the factor of the input
    is scaled back. `alpha` is 0.5 in the paper.

    Args:
      weights: [D, K, H]. magnitude: [D], the mean of |x| of each input channel over sample texts.

    Returns, Raises: as `singular_factors`.
    """
    weights = np.asarray(weights, np.float64)
    scale = (np.asarray(magnitude, np.float64) + FLOOR) ** alpha
    if scale.shape != weights.shape[:1]:
        raise UsageError(f"magnitudes are one per input channel, {weights.shape[:1]}; got {scale.shape}")
    return _factors(weights * scale[:, None, None], rank)


def principal_factors(moments: ArrayLike, rank: int) -> Factors:
    """Factors of least squared error in the keys (or values) of sample texts: their principal directions.

    No other pair of matrices of this rank rebuilds those texts better, so it is also where the paper's layer-wise
    training ends if latents are exact.

    Args:
      moments: [K, H, K, H], the mean of k kᵀ over tokens; all heads of a token together.

    Returns, Raises: as `singular_factors`.
    """
    moments = np.asarray(moments, np.float64)
    heads, dim = moments.shape[:2]
    _check_rank(rank, heads * dim, (heads, dim))
    _, vectors = np.linalg.eigh(moments.reshape(heads * dim, heads * dim))
    basis = vectors[:, ::-1][:, :rank]
    return {
        "encoder": basis[None, None].astype(np.float32),
        "decoder": basis.T.reshape(rank, heads, dim).swapaxes(0, 1)[None].astype(np.float32),
    }


def input_factor(weights: ArrayLike, encoder: ArrayLike) -> NDArray[np.float64]:
    """A [D, r] = W E: what the layer's input goes through, in the paper's form. encoder: [1, 1, K·H, r]."""
    weights = np.asarray(weights, np.float64)
    return weights.reshape(len(weights), -1) @ np.asarray(encoder, np.float64)[0, 0]


def _factors(weights: NDArray[np.float64], rank: int) -> Factors:
    """Of weights that are scaled already: their scale is undone by applying the encoder to keys instead."""
    inputs, heads, dim = weights.shape
    _check_rank(rank, min(inputs, heads * dim), weights.shape)
    _, values, right = np.linalg.svd(weights.reshape(inputs, heads * dim), full_matrices=False)
    root, right = np.sqrt(values[:rank]), right[:rank]
    safe = np.where(root > 0, root, 1.0)
    encoder = right.T / safe
    decoder = (right * np.where(root > 0, root, 0.0)[:, None]).reshape(rank, heads, dim)
    return {
        "encoder": encoder[None, None].astype(np.float32),
        "decoder": decoder.swapaxes(0, 1)[None].astype(np.float32),
    }


def _check_rank(rank: int, most: int, shape: tuple[int, ...]) -> None:
    if not 0 < rank <= most:
        raise UsageError(f"a projection of shape {shape} has ranks 1 to {most}; got {rank}")
