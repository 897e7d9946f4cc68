"""R-KV (Cai et al. 2025): while decoding, keep what is looked at and not redundant."""

from __future__ import annotations

from typing import Literal

import numpy as np

from tests.oracles.row import Row, Trace

Group = Literal["max of logits", "mean of probabilities"]


def max_pooled(scores: np.ndarray, kernel: int) -> np.ndarray:
    """The largest of `kernel` neighbours, fewer at the ends: [S] -> [S]."""
    half = kernel // 2
    return np.array([scores[max(0, i - half) : i + half + 1].max() for i in range(len(scores))])


def redundancy(keys: np.ndarray, *, threshold: float, spare: int, spare_token_0: bool) -> np.ndarray:
    """keys [S, H], rotated, oldest first -> [S] of sum 1: the softmax over tokens of how much other keys are like it.

    The cosines of all pairs, 0 on the diagonal. In the row of each token the `spare` newest of the tokens with a
    cosine above the threshold are set to 0, so that some of a group of like tokens are not called redundant. The
    redundancy of token j is the mean of column j over all rows.

    spare: 1 in the released code; the "retain_ratio 0.1" of the specification means max(1, int(0.1 · S)), which only
    a mode that is not the code's default uses. spare_token_0: in a row without any like token the cosine with token 0
    becomes 0 (a side effect of the released code).
    """
    cosine = np.zeros((len(keys), len(keys)))
    for i, row in enumerate(keys):
        for j, column in enumerate(keys):
            if i != j:
                cosine[i, j] = row @ column / (np.linalg.norm(row) * np.linalg.norm(column))
    for row in cosine:
        alike = [j for j, value in enumerate(row) if value > threshold]
        for j in alike[len(alike) - min(spare, len(alike)) :]:
            row[j] = 0
        if not alike and spare_token_0:
            row[0] = 0
    mean = cosine.mean(axis=0)
    weights = np.exp(mean - mean.max())
    return weights / weights.sum()


def observed(queries: np.ndarray, keys: np.ndarray, *, group: Group) -> np.ndarray:
    """queries [W, G, H] of the window and keys [S, H] before it -> [S]: mean over the window of the attention.

    The softmax is over these keys alone: the window's own columns are taken out before it. The query heads of the
    group are joined by the maximum of their logits before the softmax (as released) or by the mean after it.
    """
    rows = []
    for per_head in queries:
        logits = np.stack([keys @ query / np.sqrt(len(query)) for query in per_head])
        if group == "max of logits":
            logits = logits.max(axis=0, keepdims=True)
        weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
        rows.append((weights / weights.sum(axis=-1, keepdims=True)).mean(axis=0))
    return np.mean(rows, axis=0)


def rkv_scores(
    queries: np.ndarray,
    keys: np.ndarray,
    *,
    mix: float,
    kernel: int,
    group: Group,
    threshold: float,
    spare: int,
    spare_token_0: bool,
) -> np.ndarray:
    """queries [W, G, H] of the newest W tokens, keys [S, H] of all held ones -> scores [S - W] of the older ones.

    mix · max-pooled attention - (1 - mix) · redundancy (mix 0.1 by the README, 0.07 in the code; kernel 7; W 8;
    threshold 0.5). The redundancy is normalised over all held tokens, the window's among them.
    """
    before = len(keys) - len(queries)
    attention = max_pooled(observed(queries, keys[:before], group=group), kernel)
    redundant = redundancy(keys, threshold=threshold, spare=spare, spare_token_0=spare_token_0)
    return mix * attention - (1 - mix) * redundant[:before]


def rkv(
    row: Row,
    *,
    budget: int,
    every: int,
    window: int,
    mix: float,
    kernel: int,
    group: Group,
    threshold: float,
    spare: int,
    spare_token_0: bool,
    prompt_too: bool,
) -> Trace:
    """After every `every` decoded tokens (and after the prompt, if `prompt_too`), where more than `budget` tokens are
    held, each kv head keeps the `window` newest and the budget - window best others. In between everything stays.

    A decoded token reads what is held and itself before tokens go. The pool's neighbours are neighbours by position
    among what is held (the released code holds kept tokens in the order of their scores).
    """
    output, probabilities = row.attention(row.prompt)
    trace = Trace(output)
    sizes = [len(p) for p in probabilities]
    assert len(set(sizes)) == 1 and row.reads is None, "contiguous groups"
    held = [list(range(row.prompt))] * row.kv_heads

    def settled(head: int, positions: list[int]) -> list[int]:
        if len(positions) <= budget:
            return positions
        newest = positions[-window:]
        queries = row.rotated[0][newest, head * sizes[0] : (head + 1) * sizes[0]]
        keys = row.rotated[1][positions, head]
        scores = rkv_scores(
            queries,
            keys,
            mix=mix,
            kernel=kernel,
            group=group,
            threshold=threshold,
            spare=spare,
            spare_token_0=spare_token_0,
        )
        older = trace.best({p: float(s) for p, s in zip(positions, scores, strict=False)}, budget - window)
        return [*older, *newest]

    if prompt_too:
        held = [settled(h, positions) for h, positions in enumerate(held)]
    trace.kept.append(held)
    for t in range(row.prompt, row.tokens):
        held = [[*positions, t] for positions in held]
        trace.outputs.append(row.attend_held(t, held)[0])
        if (t + 1 - row.prompt) % every == 0:
            held = [settled(h, positions) for h, positions in enumerate(held)]
        trace.kept.append(held)
    return trace
