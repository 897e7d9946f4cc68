"""KVzip (Kim et al. 2025), KVzip+ and KVzap (both of kvpress).

KVzip: a token matters as much as the model looks at it while it repeats the text. KVzap: a small network per layer
that predicts the logarithm of the KVzip+ score from the hidden state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from tests.oracles.attention import contiguous
from tests.oracles.choose import best
from tests.oracles.row import Row, Trace


def chunks(prompt: int, size: int) -> list[range]:
    """The prompt in chunks of `size` tokens, the last one shorter."""
    return [range(start, min(start + size, prompt)) for start in range(0, prompt, size)]


def reconstruction_attention(
    queries: np.ndarray,
    keys: np.ndarray,
    repeat_keys: np.ndarray,
    chunk: range,
    *,
    sinks: int,
    reads: Sequence[int] | None,
) -> np.ndarray:
    """queries [R, N, H] and repeat_keys [R, K, H] of the repeating tokens (instruction and repeated text), keys
    [P, K, H] of the prompt, all rotated -> probabilities [N, R, C] for the C tokens of `chunk`.

    The softmax is over the sinks before the chunk, the chunk, and causally the repeating tokens: not over the other
    chunks, although the model itself reads those too.
    """
    reads = reads or contiguous(queries.shape[1], keys.shape[1])
    before = range(min(sinks, chunk.start))
    out = np.zeros((queries.shape[1], len(queries), len(chunk)))
    for n, h in enumerate(reads):
        for i, query in enumerate(queries[:, n]):
            seen = np.concatenate([keys[before, h], keys[chunk, h], repeat_keys[: i + 1, h]])
            logits = seen @ query / np.sqrt(len(query))
            weights = np.exp(logits - logits.max())
            out[n, i] = (weights / weights.sum())[len(before) : len(before) + len(chunk)]
    return out


def kvzip_plus_factor(
    values: np.ndarray, hidden: np.ndarray, out_projection: np.ndarray, reads: Sequence[int]
) -> np.ndarray:
    """values [C, K, H] of the chunk, hidden [R, D] (what the layer's attention reads) of the repeating tokens,
    out_projection [N, H, D] -> [N, R, C]: ‖W_O v_j‖₂ / ‖h_i‖₂."""
    out = np.zeros((len(out_projection), len(hidden), len(values)))
    for n, h in enumerate(reads):
        for j, value in enumerate(values[:, h]):
            out[n, :, j] = np.linalg.norm(value @ out_projection[n]) / np.linalg.norm(hidden, axis=-1)
    return out


def kvzip_chunk_scores(attention: np.ndarray, factor: np.ndarray | None, reads: Sequence[int]) -> np.ndarray:
    """attention [N, R, C], times `factor` for KVzip+ -> scores [K, C]: the maximum over queries and group."""
    weighted = attention if factor is None else attention * factor
    return np.stack(
        [
            np.max([weighted[n].max(axis=0) for n, h in enumerate(reads) if h == head], axis=0)
            for head in range(max(reads) + 1)
        ]
    )


def kvzip_scores(per_chunk: Sequence[np.ndarray], *, sinks: int) -> np.ndarray:
    """The chunks' scores [K, C] side by side: [K, P]; the sinks get 1 (the most that an unweighted score can be)."""
    scores = np.concatenate(per_chunk, axis=1)
    scores[:, :sinks] = 1.0
    return scores


def kvzip_row_scores(
    row: Row, repeats: Sequence[tuple[np.ndarray, np.ndarray]], *, size: int, sinks: int
) -> np.ndarray:
    """[K, P]. repeats: for each chunk of `size` tokens the rotated queries [R, N, H] and keys [R, K, H] of the tokens
    that repeat it, from a run of the model over the whole cache."""
    reads = row.reads or contiguous(row.q.shape[1], row.kv_heads)
    keys = row.rotated[1][: row.prompt]
    per_chunk = []
    for chunk, (queries, repeat_keys) in zip(chunks(row.prompt, size), repeats, strict=True):
        attention = reconstruction_attention(queries, keys, repeat_keys, chunk, sinks=sinks, reads=reads)
        per_chunk.append(kvzip_chunk_scores(attention, None, reads))
    return kvzip_scores(per_chunk, sinks=sinks)


def kvzip_kept(scores: np.ndarray, places: int) -> tuple[list[list[list[int]]], float]:
    """scores [L, K, P] -> kept positions per layer and kv head, `places` in all, with the gap at the cut."""
    _, heads, prompt = scores.shape
    chosen, gap = best(scores.reshape(-1), places)
    kept = [[[] for _ in range(heads)] for _ in scores]
    for index in chosen:
        kept[index // (heads * prompt)][index // prompt % heads].append(index % prompt)
    return kept, gap


def kvzap_target(scores: np.ndarray, *, floor: float) -> np.ndarray:
    """What KVzap learns by squared error: the logarithm of the KVzip+ score (not below `floor`)."""
    return np.log(np.maximum(scores, floor))


def kvzap_linear_fit(hidden: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """hidden [T, D], targets [T, K] -> weight [D, K], bias [K] of the smallest squared error.

    The published fit descends to it with AdamW; for the linear form this is where that ends.
    """
    padded = np.concatenate([hidden, np.ones((len(hidden), 1))], axis=1)
    solution = np.linalg.lstsq(padded, targets, rcond=None)[0]
    return solution[:-1], solution[-1]


def kvzap_scores(hidden: np.ndarray, layers: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """hidden [T, D] at the layer's input -> [K, T].

    layers: (weight, bias) as [D, K], [K] of the linear form or [D, F], [F] and [F, K], [K] of the MLP, with the exact
    GELU in between.
    """
    x = hidden
    for index, (weight, bias) in enumerate(layers):
        if index:
            x = np.array([[0.5 * u * (1 + math.erf(u / math.sqrt(2))) for u in token] for token in x])
        x = x @ weight + bias
    return x.T


def kvzap(row: Row, scores: np.ndarray, *, threshold: float, window: int) -> Trace:
    """scores [K, T] -> a token stays while it is among the `window` newest, and after that if its score is at least
    `threshold`. A decoded token reads what was held before it, and itself. There is no budget.

    The trace's gap is the smallest relative distance of a score from the threshold.
    """
    trace = Trace(row.attention(row.prompt)[0])
    scale = np.maximum(np.maximum(np.abs(scores), abs(threshold)), 1e-300)
    trace.gap = float((np.abs(scores - threshold) / scale).min())
    for tokens in range(row.prompt, row.tokens + 1):
        kept = [[p for p in range(tokens) if p >= tokens - window or head[p] >= threshold] for head in scores]
        if tokens > row.prompt:
            seen = [[*positions, tokens - 1] for positions in trace.kept[-1]]
            trace.outputs.append(row.attend_held(tokens - 1, seen)[0])
        trace.kept.append(kept)
    return trace
