"""PrefixKV (Wang et al. 2024): layers keep so many tokens that each has the same share of its attention left."""

from __future__ import annotations

from typing import Literal

import numpy as np

from tests.oracles.choose import largest_remainders
from tests.oracles.row import Row, Trace


def prefixkv_scores(row: Row) -> np.ndarray:
    """[1, P]: the attention that a token received in the prompt, summed over queries, mean over query heads."""
    _, probabilities = row.attention(row.prompt)
    return np.concatenate(probabilities).mean(axis=0).sum(axis=0)[None]


def prefix_lengths(importance: np.ndarray, share: float) -> np.ndarray:
    """importance [L, P] -> [L]: the fewest best tokens whose sum is at least `share` of the layer's sum."""
    counts = []
    for layer in importance:
        mass = np.cumsum(np.sort(layer)[::-1] / layer.sum())
        counts.append(next((k + 1 for k, sum_k in enumerate(mass) if sum_k >= share), len(layer)))
    return np.array(counts)


def bisected(importance: np.ndarray, *, total: int, steps: int) -> tuple[np.ndarray, float]:
    """importance [L, P] -> kept counts [L] whose sum is at most `total`, and their share of the importance.

    `steps` (40) halvings of 0 .. 1, none left out; the result is that of the lower end. (The released code stops when
    it is less than 5 tokens off, and otherwise when the interval collapses.)
    """
    low, high = 0.0, 1.0
    for _ in range(steps):
        middle = (low + high) / 2
        if prefix_lengths(importance, middle).sum() > total:
            high = middle
        else:
            low = middle
    return prefix_lengths(importance, low), low


def rescaled(counts: np.ndarray, *, total: int, limit: int) -> np.ndarray:
    """counts [L] times total / sum, as integers of the sum `total` (largest remainders), none above `limit`.

    What a layer cannot take goes to the others in proportion. Unspecified in the paper, where only the target is exact.
    """
    assert total <= limit * len(counts)
    shares = counts * (total / counts.sum())
    full = np.zeros(len(counts), bool)
    while (shares > limit + 1e-9).any():
        full |= shares >= limit
        left = total - limit * full.sum()
        shares = np.where(full, limit, counts * (left / max(counts[~full].sum(), 1)))
    whole = largest_remainders(shares, total)
    return np.minimum(whole, limit)


def forgotten_released(importance: np.ndarray, share: float, *, ratio: float, protected: int) -> np.ndarray:
    """The released rescaling, of *forgotten* tokens: [L].

    P - n(share) - protected (at least 0; protected: start size and the last token), times the target
    ratio · L · P over their sum, rounded down: up to L tokens fewer than the target are forgotten.
    """
    layers, tokens = importance.shape
    forgotten = np.maximum(tokens - prefix_lengths(importance, share) - protected, 0)
    return (forgotten * (ratio * layers * tokens) / forgotten.sum()).astype(int)


def profile(counts: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """The saved table: kept counts [samples, L] of sample prompts of `tokens` [samples] -> forgotten share [L], mean
    over samples."""
    return (1 - counts / tokens[:, None]).mean(axis=0)


def prompt_kept(trace: Trace, importance: np.ndarray, *, places: int, start: int) -> list[int]:
    """importance [P] -> `places` positions: the first `start`, the last, and the best others."""
    tokens = len(importance)
    if places >= tokens:
        return list(range(tokens))
    middle = {p: float(importance[p]) for p in range(start, tokens - 1)}
    return [*range(start), *trace.best(middle, places - start - 1), tokens - 1]


def prefixkv(
    row: Row,
    *,
    ratio: float,
    start: int,
    distance: int,
    decode: Literal["positional", "importance", "grow"],
    grows: bool,
) -> Trace:
    """One layer whose share of *forgotten* tokens is `ratio`; one choice for all heads.

    After the prompt round(ratio · P) tokens are forgotten, the least important; the `start` first and the last stay. A
    decoded token reads what is held and itself. Then, where the layer holds more than its budget, one token goes:
    positional (released): the one at a place fixed after the prompt, P - forgotten + distance (distance -25), or the
    middle where that is below 1; importance: the one with the least attention since the start (mean over query heads,
    summed over queries), not of the first `start` and not the newest. grow: none goes.
    grows: the budget after n tokens is n · (1 - ratio) (released), otherwise it stays that of the prompt.
    """
    output, _ = row.attention(row.prompt)
    trace = Trace(output)
    scores = dict(enumerate(prefixkv_scores(row)[0]))
    forgotten = round(ratio * row.prompt)
    held = prompt_kept(trace, np.array(list(scores.values())), places=row.prompt - forgotten, start=start)
    place = row.prompt - forgotten + distance
    place = place if place >= 1 else len(held) // 2
    trace.kept.append([held] * row.kv_heads)
    for t in range(row.prompt, row.tokens):
        held = [*held, t]
        output, rows = row.attend_held(t, [held] * row.kv_heads)
        trace.outputs.append(output)
        for position, received in zip(held, np.concatenate(rows).mean(axis=0), strict=True):
            scores[position] = scores.get(position, 0.0) + float(received)
        budget = (t + 1) * (1 - ratio) if grows else row.prompt - forgotten
        if forgotten and decode != "grow" and int(len(held) - budget) > 0:
            if decode == "positional":
                held = [*held[:place], *held[place + 1 :]]
            else:
                others = trace.best({p: scores[p] for p in held[start:-1]}, len(held) - start - 2)
                held = [*held[:start], *others, t]
        trace.kept.append([held] * row.kv_heads)
    return trace
