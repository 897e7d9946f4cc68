"""TurboQuant (Zandieh et al. 2025, arXiv 2504.19874): random rotation, then one codebook for every coordinate.

Written from a re-implementation and notes. The channel split for 2.5 and 3.5 bits is a reconstruction.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from tests.oracles import qjl
from tests.oracles.lloyd_max import lloyd_max, mean_squared_error, normal_density, sphere_density
from tests.oracles.rounding import Stored


def codebook(bits: int, dim: int, *, sphere: bool, iterations: int = 5000) -> np.ndarray:
    """Centroids [2^bits] for one coordinate of a rotated unit vector: of the sphere's density, or of N(0, 1 / dim)."""
    return lloyd_max(*(sphere_density if sphere else normal_density)(dim), 2**bits, iterations=iterations)


def theoretical_error(centroids: np.ndarray, dim: int, *, sphere: bool) -> float:
    """The expected |x - x̃|² of a unit vector; for N(0, 1 / dim) 0.363, 0.117, 0.0345, 0.0095 with 1, 2, 3, 4 bits."""
    return dim * mean_squared_error(*(sphere_density if sphere else normal_density)(dim), centroids)


def hadamard_rotation(flips: np.ndarray) -> np.ndarray:
    """flips [H] of ±1, H a power of two -> Π [H, H] = Hadamard (Sylvester's order) · diag(flips) / √H."""
    matrix = np.ones((1, 1))
    while len(matrix) < len(flips):
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix * flips / np.sqrt(len(flips))


@dataclasses.dataclass(frozen=True)
class Turned:
    """x [S, H] coded: codes [S, H] of y = Π x / ‖x‖; the distance by which a code's centroid is nearer than the next;
    norms [S] as stored; decoded [S, H].
    """

    codes: np.ndarray
    margin: np.ndarray
    norms: np.ndarray
    decoded: np.ndarray


def encode_mse(x: np.ndarray, rotation: np.ndarray, centroids: np.ndarray, *, stored: Stored) -> Turned:
    """x̃ = Πᵀ · centroid · ‖x‖. Codes come from x divided by the norm as stored; a vector of zeros stays one."""
    norms = stored(np.sqrt((x**2).sum(axis=1)))
    y = x @ rotation.T / np.where(norms == 0, 1, norms)[:, None]
    distance = np.abs(y[..., None] - centroids)
    codes, ordered = distance.argmin(axis=-1), np.sort(distance, axis=-1)
    margin = ordered[..., 1] - ordered[..., 0] if len(centroids) > 1 else np.full(x.shape, np.inf)
    return Turned(codes, margin, norms, norms[:, None] * (centroids[codes] @ rotation))


@dataclasses.dataclass(frozen=True)
class Product:
    """The unbiased form: `base` codes with one bit less, and the signs of sketched residuals r = x - x̃.

    products [S, m]: S r, of which bits are the signs. norms [S]: ‖r‖ as stored. decoded: x̃ + the residual's estimate.
    """

    base: Turned
    products: np.ndarray
    bits: np.ndarray
    norms: np.ndarray
    decoded: np.ndarray


def encode_product(
    x: np.ndarray, rotation: np.ndarray, centroids: np.ndarray, sketch: np.ndarray, *, stored: Stored
) -> Product:
    """x̃ = x̃_mse + sqrt(π / 2) / m · ‖r‖ · Sᵀ sign(S r), sketch S [m, H] Gaussian (m = H in the paper).

    centroids: of one bit less (a single 0 for one bit in all). S meets the residual in unrotated coordinates; who
    sketches the rotated residual with S' has the same with S = S' Π. Queries take no part in either coding.
    """
    base = encode_mse(x, rotation, centroids, stored=stored)
    residual = x - base.decoded
    bits, norms = qjl.signs(residual, sketch), stored(np.sqrt((residual**2).sum(axis=1)))
    decoded = base.decoded + qjl.decode(bits, norms, sketch)
    return Product(base, residual @ sketch.T, bits, norms, decoded)


def encode_split(
    x: np.ndarray,
    outlier: np.ndarray,
    rotations: tuple[np.ndarray, np.ndarray],
    codebooks: tuple[np.ndarray, np.ndarray],
    *,
    stored: Stored,
) -> tuple[Turned, Turned, np.ndarray]:
    """Fractional bits: outlier channels (bool [H]) with more bits than the rest; (outliers', rest's, decoded [S, H]).

    Each part has its own norm, rotation and codebook. A reconstruction: the description says only that outlier
    channels with other bits give 2.5 and 3.5 bits on average; how they are chosen is the caller's matter.
    """
    decoded, parts = np.zeros(x.shape), []
    for mask, rotation, centroids in zip((outlier, ~outlier), rotations, codebooks, strict=True):
        part = encode_mse(x[:, mask], rotation, centroids, stored=stored)
        decoded[:, mask] = part.decoded
        parts.append(part)
    return parts[0], parts[1], decoded
