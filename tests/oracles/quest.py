"""Quest (Tang et al. 2024): the whole cache stays; a query reads only the pages that may hold large logits."""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np

from tests.oracles.attention import attend_one, contiguous
from tests.oracles.choose import best
from tests.oracles.row import Row

Choice = Literal["per query head", "union", "max"]


def quest_places(*, budget: int, page: int) -> int:
    """How many pages a budget of tokens means: at least 3."""
    return max(3, budget // page)


def page_bounds(keys: np.ndarray, page: int) -> tuple[np.ndarray, np.ndarray]:
    """keys [S, H], rotated -> smallest and largest value of each channel in each page, [M, H]; the last page may be
    short."""
    parts = [keys[start : start + page] for start in range(0, len(keys), page)]
    return np.stack([p.min(axis=0) for p in parts]), np.stack([p.max(axis=0) for p in parts])


def page_scores(query: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """query [H], bounds [M, H] -> [M]: an upper bound of query·key over the page, sum_c max(q_c low_c, q_c high_c)."""
    scores = np.zeros(len(low))
    for m in range(len(low)):
        scores[m] = sum(max(q * a, q * b) for q, a, b in zip(query, low[m], high[m], strict=True))
    return scores


def chosen_pages(
    scores: np.ndarray, places: int, *, choice: Choice, last_counts: bool
) -> tuple[list[list[int]], float]:
    """scores [G, M] of one group -> the pages that each of its query heads reads, and the gap at the cut.

    per query head: the best `places` of its own (the original, where G = 1). union: all read what any of them chose.
    max: the best by the largest score in the group. The last page, perhaps a partial one, is always read: as one of
    the `places` (last_counts) or besides them.
    """
    pages = scores.shape[1]
    voters = scores.max(axis=0, keepdims=True) if choice == "max" else scores
    wanted = places - 1 if last_counts else places
    votes, gaps = [], []
    for voter in voters:
        among, gap = best(voter, min(wanted, pages - 1), range(pages - 1))
        votes.append([*among, pages - 1])
        gaps.append(gap)
    if choice == "max":
        votes = votes * len(scores)
    if choice == "union":
        votes = [sorted({page for vote in votes for page in vote})] * len(scores)
    return votes, min(gaps)


@dataclasses.dataclass
class PageTrace:
    """prompt_output [P, N, H], outputs: one [N, H] per decoded token; pages[i][n]: what query head n read at decoded
    token i; gap as in `Trace`."""

    prompt_output: np.ndarray
    outputs: list[np.ndarray] = dataclasses.field(default_factory=list)
    pages: list[list[list[int]]] = dataclasses.field(default_factory=list)
    gap: float = np.inf


def quest(row: Row, *, page: int, places: int, choice: Choice, last_counts: bool) -> PageTrace:
    """Decoding alone; the prompt is exact. Pages start at token 0, and the newest token is already in the last page.

    The first two layers of a model read everything: that is the caller's business.
    """
    assert row.window is None
    trace = PageTrace(row.attention(row.prompt)[0])
    reads = row.reads or contiguous(row.q.shape[1], row.kv_heads)
    q, k = row.rotated
    for t in range(row.prompt, row.tokens):
        output, read_pages = np.zeros(row.q.shape[1:]), [[] for _ in reads]
        for h in range(row.kv_heads):
            group = [n for n, head in enumerate(reads) if head == h]
            low, high = page_bounds(k[: t + 1, h], page)
            scores = np.stack([page_scores(q[t, n], low, high) for n in group])
            votes, gap = chosen_pages(scores, places, choice=choice, last_counts=last_counts)
            trace.gap = min(trace.gap, gap)
            for n, vote in zip(group, votes, strict=True):
                tokens = [s for s in range(t + 1) if s // page in vote]
                output[n], _ = attend_one(q[t, n], k[tokens, h], row.v[tokens, h], softcap=row.softcap)
                read_pages[n] = vote
        trace.outputs.append(output)
        trace.pages.append(read_pages)
    return trace
