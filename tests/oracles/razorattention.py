"""RazorAttention (Tang et al. 2024): retrieval heads keep everything, the others the ends and one mean token.

The weight of the compensation token and the bound for ALiBi models are from memory (unverified).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np

from tests.oracles.attention import contiguous
from tests.oracles.row import Row, Trace
from tests.oracles.streaming_llm import kept_after


def echo_score(attention: np.ndarray, *, period: int, first: int, over: Literal["rows", "map"]) -> float:
    """attention [S, S] of one head over a text that repeats every `period` tokens: how much a token looks at earlier
    copies of itself.

    The sum over rows i >= period and columns j < i of the same place in the period, divided by the number of rows
    (rows) or of entries (map, as released): the order of heads is the same.
    first: columns below it do not count: 1 leaves out the BOS before the text, 0 is as released, where BOS counts as a
    copy for the tokens at multiples of the period.
    """
    mass = sum(attention[i, j] for i, j in _copies(len(attention), period) if j >= first)
    return float(mass / (len(attention) if over == "rows" else attention.size))


def induction_score(attention: np.ndarray, *, period: int, first: int, over: Literal["rows", "map"]) -> float:
    """The same for the tokens *after* the earlier copies of a token (`first` bounds the copies, not what is after)."""
    mass = sum(attention[i, j + 1] for i, j in _copies(len(attention), period) if j >= first)
    return float(mass / (len(attention) if over == "rows" else attention.size))


def _copies(tokens: int, period: int) -> list[tuple[int, int]]:
    return [(i, j) for i in range(period, tokens) for j in range(i % period, i, period)]


def group_max(scores: np.ndarray, reads: Sequence[int]) -> np.ndarray:
    """Scores [N] of query heads -> [K]: the largest of the group."""
    return np.array([max(s for s, h in zip(scores, reads, strict=True) if h == head) for head in range(max(reads) + 1)])


def retrieval_heads(
    echo: np.ndarray, induction: np.ndarray, *, echo_share: float, induction_share: float
) -> np.ndarray:
    """echo, induction [L, K] -> [L, K]: round(share · L · K) best of all layers by either (1% and 14%), joined."""
    chosen = np.zeros(echo.size, bool)
    for scores, share in ((echo, echo_share), (induction, induction_share)):
        order = np.argsort(-scores.reshape(-1), kind="stable")
        chosen[order[: round(share * scores.size)]] = True
    return chosen.reshape(echo.shape)


def alibi_reach(
    wq: np.ndarray, wk: np.ndarray, gamma: np.ndarray, beta: np.ndarray, slope: float, epsilon: float
) -> float:
    """[unverified] wq, wk [D, H], LayerNorm weights gamma, beta [D]: farther tokens get less than epsilon attention."""
    spectral = np.linalg.norm(wq @ wk.T, ord=2)
    return float((2 * spectral * (gamma @ gamma + beta @ beta) - np.log(epsilon)) / slope)


def buffer_length(*, tokens: int, least: int, ratio: float) -> int:
    """max(S0, N / C), rounded down: S0 4000, C 5."""
    return max(least, int(tokens / ratio))


def compensated(
    query: np.ndarray, keys: np.ndarray, values: np.ndarray, dropped: tuple[np.ndarray, np.ndarray] | None, weight: int
) -> np.ndarray:
    """query [H] over kept keys, values [S, H] and `weight` copies of the compensation token (key, value): [H].

    o = (w e^{q·k̂/√H} v̂ + sum e^{q·k/√H} v) / (w e^{q·k̂/√H} + sum e^{q·k/√H})
    """
    counts = np.ones(len(keys))
    if dropped is not None:
        keys, values = np.concatenate([keys, dropped[0][None]]), np.concatenate([values, dropped[1][None]])
        counts = np.append(counts, weight)
    logits = keys @ query / np.sqrt(len(query))
    weights = counts * np.exp(logits - logits.max())
    return weights @ values / weights.sum()


@dataclasses.dataclass
class RazorTrace(Trace):
    """mean_keys[i][h], mean_values[i][h] [H], counts[i][h]: the compensation token of kv head h, as `kept`."""

    mean_keys: list[list[np.ndarray | None]] = dataclasses.field(default_factory=list)
    mean_values: list[list[np.ndarray | None]] = dataclasses.field(default_factory=list)
    counts: list[list[int]] = dataclasses.field(default_factory=list)


def razor(
    row: Row,
    retrieval: Sequence[bool],
    *,
    sinks: int,
    local: int,
    weighted: bool,
    slides: bool,
    leaves: Literal["before", "after"],
) -> RazorTrace:
    """retrieval: by kv head. A head that is not one keeps after the prompt the first `sinks` and the `local` newest
    tokens, and the mean of the rotated keys and of the values of all dropped ones.

    weighted: the mean token counts as often as there are dropped tokens (paper, from memory); otherwise once (as
    deployed, where it also takes one of the local places: pass local - 1). slides: the window goes on sliding and the
    mean takes in what leaves, before the decoded token reads or after; otherwise decoded tokens all stay (as deployed).
    """
    assert row.window is None and row.softcap is None
    trace = RazorTrace(row.attention(row.prompt)[0])
    reads = row.reads or contiguous(row.q.shape[1], row.kv_heads)
    q, k = row.rotated

    def split(head: int, tokens: int) -> tuple[list[int], list[int]]:
        kept = list(range(tokens))
        if not retrieval[head]:
            kept = kept_after(tokens if slides else row.prompt, sinks + local, sinks)
            kept = kept if slides else [*kept, *range(row.prompt, tokens)]
        return kept, [p for p in range(tokens) if p not in kept]

    def record(tokens: int) -> None:
        parts = [split(h, tokens) for h in range(row.kv_heads)]
        trace.kept.append([kept for kept, _ in parts])
        trace.counts.append([len(dropped) for _, dropped in parts])
        for lists, x in ((trace.mean_keys, k), (trace.mean_values, row.v)):
            lists.append([x[dropped, h].mean(axis=0) if dropped else None for h, (_, dropped) in enumerate(parts)])

    record(row.prompt)
    for t in range(row.prompt, row.tokens):
        output = np.zeros(row.q.shape[1:])
        for n, h in enumerate(reads):
            kept, dropped = split(h, t + 1 if leaves == "before" else t)
            kept = kept if leaves == "before" else [*kept, t]
            mean = (k[dropped, h].mean(axis=0), row.v[dropped, h].mean(axis=0)) if dropped else None
            output[n] = compensated(q[t, n], k[kept, h], row.v[kept, h], mean, len(dropped) if weighted else 1)
        trace.outputs.append(output)
        record(t + 1)
    return trace
