"""DiffQKV of Sigma (Lin et al. 2025): heads and channels of queries, keys and values are chosen separately."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.oracles.rotary import rotate_each


def diffqkv(
    x: np.ndarray,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    o: np.ndarray,
    *,
    theta: float,
    widen: Callable[[np.ndarray], np.ndarray] = lambda x: x,
) -> np.ndarray:
    """One row x [T, D] -> [T, D].

    q: [D', N, d]. k: [D, n_k, d]. v: [D, n_v, H]. o: [N, H, D]. widen: what queries are made of, [D] to [D'].
    """
    tokens, (_, heads, key_dim) = np.arange(len(x)), q.shape
    queries = np.stack([np.einsum("d,dnc->nc", widen(row), q) for row in x])
    keys, values = np.einsum("td,dkc->tkc", x, k), np.einsum("td,dvh->tvh", x, v)
    queries, keys = (rotate_each(part, tokens, theta) for part in (queries, keys))
    out = np.zeros((len(x), o.shape[-1]))
    for i in range(heads):
        key_head, value_head = i * k.shape[1] // heads, i * v.shape[1] // heads
        for t in tokens:
            logits = keys[: t + 1, key_head] @ queries[t, i] / np.sqrt(key_dim)
            weights = np.exp(logits - logits.max())
            out[t] += weights / weights.sum() @ values[: t + 1, value_head] @ o[i]
    return out
