"""Statistics of patches as an encoder, found without labels.

A dictionary of small patches is learnt by spherical k-means from images of classes that are not in the stream; features
are how strongly, and how often, its entries show in an image (Coates, Lee and Ng, 2011, "An analysis of single-layer
networks in unsupervised feature learning"). Its
channels know nothing of classes, neither of those that it was learnt from nor of those to come.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Images = NDArray[np.float32]

PATCH, STRIDE, CHUNK = 12, 2, 128
SAMPLED, PASSES, DULLEST = 20_000, 8, 0.3
"""Patches to learn from, passes over them, and the share of those with the least contrast that is left out."""


def learn_dictionary(images: Images, entries: int, seed: int) -> Floats:
    """Spherical k-means over patches; a patch and its negative are the same, as shapes are lighter or darker."""
    rng = np.random.default_rng(seed)
    every = patches(contrast(images), PATCH // 4).reshape(-1, PATCH * PATCH)
    chosen = every[rng.permutation(len(every))[:SAMPLED]]
    lengths = np.linalg.norm(chosen, axis=1)
    bright = lengths > np.quantile(lengths, DULLEST)
    chosen = chosen[bright] / lengths[bright, None]
    words = chosen[rng.permutation(len(chosen))[:entries]]
    for _ in range(PASSES):
        response = chosen @ words.T
        nearest = np.abs(response).argmax(1)
        sums = np.zeros_like(words)
        np.add.at(sums, nearest, chosen * np.sign(response[np.arange(len(chosen)), nearest])[:, None])
        length = np.linalg.norm(sums, axis=1, keepdims=True)
        words = np.where(length > 1e-6, sums / np.maximum(length, 1e-6), words)
    return words.astype(np.float32)


def statistics(images: Images, dictionary: Floats) -> Floats:
    """[n, 2 * entries]: of each entry's response, where it is above the mean of all entries, mean and maximum."""
    parts = []
    for start in range(0, len(images), CHUNK):
        found = patches(contrast(images[start : start + CHUNK]), STRIDE)
        strongest = np.linalg.norm(found, axis=2).max(1)
        response = np.abs(found @ dictionary.T) / np.maximum(strongest, 1e-6)[:, None, None]
        response = np.maximum(response - response.mean(2, keepdims=True), 0)
        parts.append(np.concatenate([response.mean(1), response.max(1)], axis=1))
    return np.concatenate(parts).astype(np.float32)


def contrast(images: Images) -> Floats:
    """[n, 32, 32, 3] to [n, 32, 32], along the colour in which an image varies most: shapes are of any colour."""
    flat = images.reshape(len(images), -1, images.shape[-1])
    flat = flat - flat.mean(1, keepdims=True)
    direction = np.linalg.eigh(np.einsum("npi,npj->nij", flat, flat))[1][:, :, -1]
    return np.einsum("npi,ni->np", flat, direction).reshape(images.shape[:3])


def patches(grey: Floats, stride: int) -> Floats:
    """[n, 32, 32] to [n, places, PATCH * PATCH], each less its mean."""
    windows = np.lib.stride_tricks.sliding_window_view(grey, (PATCH, PATCH), axis=(1, 2))[:, ::stride, ::stride]
    found = windows.reshape(len(grey), -1, PATCH * PATCH)
    return found - found.mean(2, keepdims=True)
