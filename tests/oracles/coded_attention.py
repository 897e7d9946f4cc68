"""Decoding over a cache whose oldest tokens are coded and whose newest are exact."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tests.oracles.attention import attend
from tests.oracles.row import Row


def flushed(tokens: int, residual: int) -> int:
    """Oldest tokens that are coded when a tail of `residual` exact tokens goes as one block as soon as it is full."""
    return tokens // residual * residual


def slid(tokens: int, residual: int) -> int:
    """Oldest tokens that are coded when exactly the `residual` newest are exact."""
    return max(0, tokens - residual)


def decode_over(
    row: Row,
    keys: np.ndarray,
    values: np.ndarray,
    coded_keys: Sequence[int],
    coded_values: Sequence[int],
    *,
    queries: np.ndarray | None = None,
) -> list[np.ndarray]:
    """keys (rotated), values [S, K, H]: what decoding the coded tokens returns. Outputs [N, H], one per decoded token.

    Decoded token i reads the first coded_keys[i] keys and the first coded_values[i] values in their decoded form, all
    others exactly; a count of more tokens than there were before it means that it reads itself in coded form too.
    """
    assert row.window is None
    q, k = row.rotated
    q = q if queries is None else queries
    outputs = []
    for i, t in enumerate(range(row.prompt, row.tokens)):
        old_keys, old_values = coded_keys[i], coded_values[i]
        held_keys = [np.concatenate([keys[:old_keys, h], k[old_keys : t + 1, h]]) for h in range(row.kv_heads)]
        held_values = [
            np.concatenate([values[:old_values, h], row.v[old_values : t + 1, h]]) for h in range(row.kv_heads)
        ]
        outputs.append(attend(q[t], held_keys, held_values, reads=row.reads, softcap=row.softcap)[0])
    return outputs
