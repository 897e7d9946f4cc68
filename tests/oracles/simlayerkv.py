"""SimLayerKV (Zhang et al. 2024): a layer whose newest query looks only at the ends keeps only the ends."""

from __future__ import annotations

import numpy as np

from tests.oracles.row import Row, Trace
from tests.oracles.streaming_llm import kept_after


def ends_mass(row: Row, *, sinks: int, recent: int, queries: int, skip_queries: bool) -> float:
    """The attention of the prompt's last `queries` queries on the first `sinks` and the `recent` newest tokens, mean
    over query heads and queries (queries 1 in kvpress, "the last query").

    skip_queries: the columns of those last queries are left out first, so that `recent` counts back from before them
    and the attention of a query on itself is not counted (kvpress; the softmax is over all). The specification does
    not say.
    """
    _, probabilities = row.attention(row.prompt)
    rows = np.concatenate(probabilities)[:, -queries:]
    mean = rows.mean(axis=(0, 1))
    if skip_queries:
        mean = mean[: row.prompt - queries]
    return float(sum(mass for p, mass in enumerate(mean) if p < sinks or p >= len(mean) - recent))


def simlayerkv(
    row: Row, *, sinks: int, recent: int, queries: int, skip_queries: bool, threshold: float, slides: bool
) -> Trace:
    """A layer is lazy if the mass exceeds the threshold; then it keeps after the prompt the first `sinks` and the
    `recent` newest tokens (kvpress: recent - queries), otherwise everything.

    A prompt of fewer than sinks + recent tokens is kept whole. Decoded tokens read what is held and themselves; a lazy
    layer then keeps them all (slides=False, as in kvpress) or goes on keeping only the ends. The trace's gap is the
    distance of the mass from the threshold, relative to the larger.
    """
    trace = Trace(row.attention(row.prompt)[0])
    mass = ends_mass(row, sinks=sinks, recent=recent, queries=queries, skip_queries=skip_queries)
    lazy = mass > threshold and row.prompt >= sinks + recent
    trace.gap = abs(mass - threshold) / max(abs(mass), abs(threshold), 1e-300)
    held = kept_after(row.prompt, sinks + recent, sinks) if lazy else list(range(row.prompt))
    trace.kept.append([held] * row.kv_heads)
    for t in range(row.prompt, row.tokens):
        trace.outputs.append(row.attend_held(t, [[*held, t]] * row.kv_heads)[0])
        held = kept_after(t + 1, sinks + recent, sinks) if lazy and slides else [*held, t]
        trace.kept.append([held] * row.kv_heads)
    return trace
