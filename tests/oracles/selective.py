"""Selective attention (Leviathan et al., 2024) of one row, from the description alone: float64, a token at a time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def accumulated(q: np.ndarray, k: np.ndarray, scale: float, window: int | None = None) -> np.ndarray:
    """F [T + 1, T] of the rotated q, k [T, H] of head 0: row t is what lowers the logits of query t.

    The logits of head 0, with 0 where they are masked, through a ReLU; column 0 and the diagonal 0; shifted down by one
    query, so that the first row is 0 and the last is that of the query which is still to come; summed down the rows.
    """
    tokens = len(q)
    asked = np.zeros((tokens, tokens))
    for t in range(tokens):
        for s in range(tokens):
            masked = s > t or (window is not None and t - s >= window)
            asked[t, s] = 0.0 if masked or s in (0, t) else max(0.0, scale * float(q[t] @ k[s]))
    shifted = np.concatenate([np.zeros((1, tokens)), asked])
    return np.cumsum(shifted, axis=0)


def attend(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    scale: float,
    *,
    reads: Sequence[int],
    window: int | None = None,
    kept: Sequence[set[int]] | None = None,
) -> np.ndarray:
    """The output [T, N, H] of rotated q [T, N, H] over k, v [T, K, H]; kept[t]: the tokens that query t still has."""
    tokens, heads = q.shape[:2]
    hidden = accumulated(q[:, 0], k[:, reads[0]], scale, window)
    out = np.zeros((tokens, heads, v.shape[-1]))
    for t in range(tokens):
        seen = [s for s in range(t + 1) if window is None or t - s < window]
        seen = seen if kept is None else [s for s in seen if s in kept[t]]
        for n in range(heads):
            logits = np.array([scale * float(q[t, n] @ k[s, reads[n]]) - hidden[t, s] for s in seen])
            weights = np.exp(logits - logits.max())
            out[t, n] = (weights / weights.sum()) @ v[seen, reads[n]]
    return out


def evicted(q: np.ndarray, k: np.ndarray, scale: float, prompt: int, budget: int) -> tuple[list[set[int]], np.ndarray]:
    """What a budget leaves of one row, the prompt of which attends to itself whole and is pruned at its end.

    Then each decoded token's query reads what there is, asks, joins, and the most hidden token goes; the newest stays.
    q, k [T, H] of head 0, rotated. Returns what query t reads beside itself, for every t (all earlier tokens within the
    prompt), with what is there at the end behind it; and the final F [T].
    """
    tokens = len(q)
    hidden = accumulated(q[:prompt], k[:prompt], scale)[-1]
    hidden = np.concatenate([hidden, np.zeros(tokens - prompt)])
    older = sorted(range(prompt - 1), key=lambda s: (hidden[s], s))
    held = {*older[: budget - 1], prompt - 1}
    moments = [set(range(t)) for t in range(prompt)]
    for t in range(prompt, tokens):
        moments.append(set(held))
        for s in held - {0}:
            hidden[s] += max(0.0, scale * float(q[t] @ k[s]))
        if len(held) == budget:
            held.remove(max(held, key=lambda s: (hidden[s], -s)))
        held.add(t)
    return [*moments, held], hidden
