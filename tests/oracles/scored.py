"""Eviction by scores that are given: the random baseline, and any policy whose scores never change."""

from __future__ import annotations

import numpy as np

from tests.oracles.row import Row, Trace


def scored(row: Row, scores: np.ndarray, *, sinks: int, recent: int, places: int) -> Trace:
    """scores [K, T] by position. Of the prompt, the sinks, the `recent` newest and the `places` best others stay.

    What is decoded later stays.
    """
    trace = Trace(row.attention(row.prompt)[0])
    middle = range(min(sinks, row.prompt), max(row.prompt - recent, min(sinks, row.prompt)))
    always = [p for p in range(row.prompt) if p not in middle]
    chosen = [trace.best({p: float(head[p]) for p in middle}, places) for head in scores]
    kept = [sorted([*always, *positions]) for positions in chosen]
    trace.kept.append(kept)
    for t in range(row.prompt, row.tokens):
        kept = [[*positions, t] for positions in kept]
        trace.outputs.append(row.attend_held(t, kept)[0])
        trace.kept.append(kept)
    return trace
