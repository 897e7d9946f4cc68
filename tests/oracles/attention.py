"""Softmax attention of one row, in float64, one query at a time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def contiguous(query_heads: int, kv_heads: int) -> list[int]:
    """The kv head that each query head reads in grouped-query attention: n // G."""
    return [n // (query_heads // kv_heads) for n in range(query_heads)]


def attend_one(
    query: np.ndarray, keys: np.ndarray, values: np.ndarray, *, softcap: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """One query [H] over keys [S, H] and values [S, H]: the output [H] and the probabilities [S]."""
    logits = keys @ query / np.sqrt(query.shape[-1])
    if softcap is not None:
        logits = softcap * np.tanh(logits / softcap)
    weights = np.exp(logits - logits.max())
    probabilities = weights / weights.sum()
    return probabilities @ values, probabilities


def attend(
    query: np.ndarray,
    keys: Sequence[np.ndarray],
    values: Sequence[np.ndarray],
    *,
    reads: Sequence[int] | None = None,
    softcap: float | None = None,
) -> tuple[np.ndarray, list[np.ndarray]]:
    """One token's query heads [N, H] over the K heads' own [S_k, H] keys and values; head n reads kv head reads[n].

    Returns the output [N, H] and, per kv head, the probabilities [G_k, S_k] of the query heads that read it.
    """
    outputs, probabilities = [], [[] for _ in keys]
    for n, head in enumerate(reads or contiguous(len(query), len(keys))):
        output, row = attend_one(query[n], keys[head], values[head], softcap=softcap)
        outputs.append(output)
        probabilities[head].append(row)
    return np.stack(outputs), [np.stack(rows) for rows in probabilities]


def causal(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    reads: Sequence[int] | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[np.ndarray, list[np.ndarray]]:
    """q [T, N, H] over k, v [T, K, H], already rotated.

    Token t reads itself and what came before; with a sliding `window` only the tokens t - window + 1 .. t.
    Returns the output [T, N, H] and per kv head the probabilities [G_k, T, T], 0 where masked.
    """
    tokens, heads = len(q), range(k.shape[1])
    reads = reads or contiguous(q.shape[1], k.shape[1])
    outputs = np.zeros(q.shape)
    probabilities = [np.zeros((sum(r == h for r in reads), tokens, tokens)) for h in heads]
    for t in range(tokens):
        seen = slice(0 if window is None else max(0, t - window + 1), t + 1)
        keys, values = [k[seen, h] for h in heads], [v[seen, h] for h in heads]
        outputs[t], rows = attend(q[t], keys, values, reads=reads, softcap=softcap)
        for head in heads:
            probabilities[head][:, t, seen] = rows[head]
    return outputs, probabilities
