"""CaM (Zhang et al. 2024): the value of an evicted token is added, by chance, to the values that stay after it.

Unverified: from the abstract, three released scripts (which differ: see the arguments) and a later public
re-implementation (kvpress); the paper's own equations were not at hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from tests.oracles.attention import attend
from tests.oracles.row import Row, Trace

Against = Literal["targets", "recent", "largest"]
History = Literal["step", "generated", "all"]


def merge_probability(attention: float, others: Sequence[float], *, against: Against) -> float:
    """The evicted token's attention over the mean (or the largest) of `others`', cut to [0, 1]. An attention of 0, or
    nothing to compare with: 0."""
    if not others:
        return 0.0
    reference = max(others) if against == "largest" else float(np.mean(others))
    if reference == 0:
        return float(attention > 0)
    return min(max(attention / reference, 0.0), 1.0)


def merged(values: dict[int, np.ndarray], evicted: int, targets: Sequence[int]) -> dict[int, np.ndarray]:
    """values [H] by position, the evicted one's among them -> without it; each target has its value / their number
    added. Keys do not change."""
    out = {p: v for p, v in values.items() if p != evicted}
    for p in targets:
        out[p] = out[p] + values[evicted] / len(targets)
    return out


class _Head:
    """One kv head: values by position, accumulated attention by position."""

    def __init__(self, trace: Trace, head: int) -> None:
        self.trace, self.head = trace, head
        self.values: dict[int, np.ndarray] = {}
        self.attention: dict[int, float] = {}
        self.importance: dict[int, float] = {}

    def merge(self, evicted: int, newest: int, recent: int, draw: float, into: int, against: Against) -> None:
        """`draw` in [0, 1) below the probability: the value is merged into the next `into` held tokens."""
        after = [p for p in sorted(self.values) if p > evicted][:into]
        window = [p for p in self.values if p > newest - recent and p != evicted]
        others = {"targets": after, "recent": window, "largest": [p for p in self.values if p != evicted]}[against]
        probability = merge_probability(self.attention[evicted], [self.attention[p] for p in others], against=against)
        self.trace.gap = min(self.trace.gap, abs(probability - draw) / max(probability, draw, 1e-300))
        if draw < probability:
            self.values = merged(self.values, evicted, after)

    def lose(self, evicted: int) -> None:
        for by_position in (self.values, self.attention, self.importance):
            by_position.pop(evicted, None)


def cam(
    row: Row,
    *,
    sinks: int,
    recent: int,
    heavy: int,
    into: int,
    draws: np.ndarray,
    history: History,
    against: Against,
    prompt_merges: bool,
) -> Trace:
    """draws [K, T]: uniform in [0, 1), one for each token that is evicted.

    What is evicted: of the tokens between the `sinks` first and the `recent` newest all but the `heavy` with the most
    attention since the start (as H2O; heavy 0 is the released StreamingLLM-like form). A decoded token reads what is
    held, with values as merged so far, and itself; then it enters and one token goes.
    history, the attention that decides on merging, summed over the group: of this step's query (`step`; released, the
    generating Llama script), accumulated over the decoded queries (`generated`; kvpress), or over all queries (`all`;
    released, the script that evaluates whole texts). against: the mean over the `into` tokens it would be merged into
    (`targets`; kvpress), the mean over the window (`recent`), or the largest of all held tokens (`largest`).
    prompt_merges: tokens evicted after the prompt are merged as well, the oldest first, each into what is held at that
    moment, so that a value can move on; their attention is that of the last query or of the whole prompt (`all`);
    otherwise they are lost. With fewer than `into` tokens after it the value is divided by their number (kvpress).
    """
    assert row.window is None
    output, probabilities = row.attention(row.prompt)
    trace = Trace(output)
    q, k = row.rotated
    heads = [_Head(trace, h) for h in range(row.kv_heads)]
    for head, received in zip(heads, probabilities, strict=True):
        everything, newest = received.sum(axis=(0, 1)), received[:, -1].sum(axis=0)
        head.values = {p: row.v[p, head.head] for p in range(row.prompt)}
        head.importance = dict(enumerate(everything))
        head.attention = dict(enumerate(everything if history == "all" else newest))

    def settle(newest: int, merges: bool) -> None:
        for head in heads:
            middle = {p: head.importance[p] for p in head.values if sinks <= p <= newest - recent}
            winners = trace.best(middle, heavy) if heavy else []
            for evicted in sorted(p for p in middle if p not in winners):
                if merges:
                    head.merge(evicted, newest, recent, float(draws[head.head, evicted]), into, against)
                head.lose(evicted)
        trace.kept.append([sorted(head.values) for head in heads])

    settle(row.prompt - 1, prompt_merges)
    if history == "generated":
        for head in heads:
            head.attention = dict.fromkeys(head.values, 0.0)
    for t in range(row.prompt, row.tokens):
        for head in heads:
            head.values[t] = row.v[t, head.head]
        positions = [sorted(head.values) for head in heads]
        keys = [k[held, h] for h, held in enumerate(positions)]
        values = [np.stack([head.values[p] for p in held]) for head, held in zip(heads, positions, strict=True)]
        output, rows = attend(q[t], keys, values, reads=row.reads, softcap=row.softcap)
        trace.outputs.append(output)
        for head, held, received in zip(heads, positions, rows, strict=True):
            for p, mass in zip(held, received.sum(axis=0), strict=True):
                head.importance[p] = head.importance.get(p, 0.0) + float(mass)
                head.attention[p] = float(mass) + (0.0 if history == "step" else head.attention.get(p, 0.0))
        settle(t, True)
    return trace
