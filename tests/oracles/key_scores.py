"""Scores from keys and values alone: Knorm, KeyDiff, LagKV."""

from __future__ import annotations

import numpy as np

from tests.oracles.row import Row


def knorm_scores(row: Row) -> np.ndarray:
    """Knorm (Devoto et al. 2024): [K, P], minus the Euclidean norm of the key."""
    return -np.linalg.norm(row.k[: row.prompt], axis=-1).T


def keydiff_scores(row: Row) -> np.ndarray:
    """KeyDiff (Park et al. 2025): [K, P], minus the cosine between the rotated key and the mean of all normalised
    rotated keys of the prompt."""
    scores = np.zeros((row.kv_heads, row.prompt))
    for h in range(row.kv_heads):
        keys = row.rotated[1][: row.prompt, h]
        anchor = np.mean([key / np.linalg.norm(key) for key in keys], axis=0)
        for j, key in enumerate(keys):
            scores[h, j] = -(key @ anchor) / (np.linalg.norm(key) * np.linalg.norm(anchor))
    return scores


def lag_chunk_scores(x: np.ndarray, following: np.ndarray, *, ddof: int) -> np.ndarray:
    """One chunk x [lag, H] of keys or values and the chunk after it [lag, H] -> scores [lag] of sum 1.

    Each channel of x is measured by the smallest and the largest value of the following chunk; then the standard
    deviation over channels (ddof 1 in kvpress), then the softmax over the chunk's tokens.
    """
    low, high = following.min(axis=0), following.max(axis=0)
    spread = np.array([np.std((token - low) / (high - low), ddof=ddof) for token in x])
    weights = np.exp(spread - spread.max())
    return weights / weights.sum()


def lagkv_scores(row: Row, *, sinks: int, lag: int, ddof: int, ranked: bool) -> np.ndarray:
    """LagKV (Liang et al. 2025): [K, P], with rotated keys; no attention is looked at.

    After the sinks come chunks of `lag` tokens. A chunk that has a full chunk after it gets the mean of its keys' and
    its values' scores, `ranked` as rank / lag within the chunk (0 the lowest), else as they are (for heads or chunks
    that are compared with each other). Sinks, the last full chunk and the tail after it get 1, which no other reaches.
    A prompt shorter than the sinks and two chunks: sinks 1, the others their place / their number, so that the newest
    are kept (kvpress; the specification does not say).
    """
    keys, values = row.rotated[1][: row.prompt], row.v[: row.prompt]
    scores = np.ones((row.kv_heads, row.prompt))
    if row.prompt < sinks + 2 * lag:
        others = row.prompt - sinks
        for place in range(max(others, 0)):
            scores[:, sinks + place] = place / others
        return scores
    full = (row.prompt - sinks) // lag
    for h in range(row.kv_heads):
        for chunk in range(full - 1):
            here = slice(sinks + chunk * lag, sinks + (chunk + 1) * lag)
            after = slice(here.stop, here.stop + lag)
            both = [lag_chunk_scores(x[here, h], x[after, h], ddof=ddof) for x in (keys, values)]
            score = (both[0] + both[1]) / 2
            if ranked:
                score = np.array([sum(other < own for other in score) / lag for own in score])
            scores[h, here] = score
    return scores
