"""Multi-head latent attention as DeepSeek-V2 writes it (arXiv 2405.04434, equations 9 to 19), nothing absorbed.

One row, one token and one head at a time, in float64. `weights` holds W_DKV [D, R], W_KR [D, C], W_UK [N, R, H], W_UV
[N, R, H'], W_Q [D or Q, N, H + C], W_O [N, H', D], the scale of c's norm, and W_DQ [D, Q] with its norm's or None.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.oracles.rotary import rotate


def norm(x: np.ndarray, scale: np.ndarray, eps: float) -> np.ndarray:
    """x / rms(x) * scale."""
    return x / np.sqrt(np.mean(x**2) + eps) * scale


def latents(x: np.ndarray, weights: dict[str, Any], eps: float = 1e-6) -> tuple[np.ndarray, np.ndarray]:
    """What is cached of tokens x [T, D]: c after its norm [T, R], and the key that is still to be rotated [T, C]."""
    c = np.stack([norm(token @ weights["W_DKV"], weights["norm"], eps) for token in x])
    return c, x @ weights["W_KR"]


def attend(
    x: np.ndarray, weights: dict[str, Any], *, theta: float, eps: float = 1e-6, factor: float = 1.0
) -> np.ndarray:
    """The layer's output [T, D] of tokens x [T, D] at positions 0, 1, ..."""
    tokens, heads = len(x), len(weights["W_UK"])
    c, shared = latents(x, weights, eps)
    shared = np.stack([rotate(key, p, theta) for p, key in enumerate(shared)])
    out = np.zeros((tokens, weights["W_O"].shape[-1]))
    for n in range(heads):
        keys = np.concatenate([c @ weights["W_UK"][n], shared], axis=1)
        values = c @ weights["W_UV"][n]
        plain = weights["W_UK"].shape[-1]
        for t in range(tokens):
            source = x[t] if weights["W_DQ"] is None else norm(x[t] @ weights["W_DQ"], weights["q_norm"], eps)
            query = source @ weights["W_Q"][:, n]
            query = np.concatenate([query[:plain], rotate(query[plain:], t, theta)])
            logits = factor * keys[: t + 1] @ query / np.sqrt(len(query))
            p = np.exp(logits - logits.max())
            out[t] += (p / p.sum()) @ values[: t + 1] @ weights["W_O"][n]
    return out
