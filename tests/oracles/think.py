"""ThinK (Xu et al. 2024, arXiv 2407.21018): key channels that matter little to the queries are dropped."""

from __future__ import annotations

import dataclasses

import numpy as np

from tests.oracles.attention import contiguous
from tests.oracles.coded_attention import decode_over
from tests.oracles.row import Row


def think_scores(row: Row, *, window: int) -> np.ndarray:
    """Scores [K, H] of the rotated keys' channels: mean of q² times mean of k².

    Of q over the last `window` queries of the prompt, then over the query heads of the group; of k over the prompt.
    """
    q, k = (x[: row.prompt] for x in row.rotated)
    reads = row.reads or contiguous(q.shape[1], row.kv_heads)
    scores = np.zeros(k.shape[1:])
    for head in range(row.kv_heads):
        group = [n for n, read in enumerate(reads) if read == head]
        queries = np.mean([(q[-window:, n] ** 2).mean(axis=0) for n in group], axis=0)
        scores[head] = queries * (k[:, head] ** 2).mean(axis=0)
    return scores


@dataclasses.dataclass
class ThinkTrace:
    """channels[h]: the kept channels of kv head h. keys [P, K, H]: the prompt's, rotated, 0 in dropped channels.

    gap: the smallest distance, relative to the larger, between the scores on the two sides of a cut.
    """

    prompt_output: np.ndarray
    outputs: list[np.ndarray]
    channels: list[list[int]]
    keys: np.ndarray
    gap: float


def think(row: Row, *, window: int, channels: int, whole: int) -> ThinkTrace:
    """After an exact prompt each kv head keeps its `channels` best key channels, the same ones for all its tokens.

    The `whole` newest tokens of the prompt keep all channels (the paper: the window; kvpress: 0), and so do decoded
    tokens. The logits' factor stays 1 / √H.
    """
    scores = think_scores(row, window=window)
    chosen, gap = [], np.inf
    for line in scores:
        order = sorted(range(len(line)), key=lambda channel: -line[channel])
        chosen.append(sorted(order[:channels]))
        if 0 < channels < len(order):
            kept, lost = line[order[channels - 1]], line[order[channels]]
            gap = min(gap, (kept - lost) / max(kept, 1e-300))
    keys = row.rotated[1][: row.prompt].copy()
    for head, kept in enumerate(chosen):
        dropped = [c for c in range(keys.shape[-1]) if c not in kept]
        keys[: max(0, row.prompt - whole), head, dropped] = 0.0
    counts = [row.prompt] * (row.tokens - row.prompt)
    outputs = decode_over(row, keys, row.v[: row.prompt], counts, counts)
    return ThinkTrace(row.attention(row.prompt)[0], outputs, chosen, keys, float(gap))
