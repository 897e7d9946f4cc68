"""Eviction after every decoded token by scores that need no attention."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.oracles.row import Row, Trace


def online(row: Row, scores: Callable[[int], np.ndarray], *, sinks: int, recent: int, places: int) -> Trace:
    """scores(n) -> [K, n], those of the first n tokens once n have been seen.

    After the prompt the sinks, the `recent` newest and the `places` best others stay. A decoded token reads what is
    held and itself; then the same is chosen again among what is held.
    """
    trace = Trace(row.attention(row.prompt)[0])
    held = [list(range(row.prompt))] * row.kv_heads
    for seen in range(row.prompt, row.tokens + 1):
        if seen > row.prompt:
            held = [[*positions, seen - 1] for positions in held]
            trace.outputs.append(row.attend_held(seen - 1, held)[0])
        now, kept = scores(seen), []
        for positions, head in zip(held, now, strict=True):
            always = [p for p in positions if p < sinks or p >= seen - recent]
            others = {p: float(head[p]) for p in positions if p not in always}
            kept.append(sorted([*always, *trace.best(others, places)]))
        held = kept
        trace.kept.append(held)
    return trace
