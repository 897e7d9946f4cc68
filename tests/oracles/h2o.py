"""H2O (Zhang et al. 2023): recent tokens and heavy hitters of accumulated attention, per kv head."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tests.oracles.row import Row, Trace


class _Head:
    """What one kv head holds, with the attention probability that each token has received so far."""

    def __init__(self, trace: Trace, sinks: int, recent: int, heavy: int, every: int) -> None:
        self.trace, self.sinks, self.recent, self.heavy, self.every = trace, sinks, recent, heavy, every
        self.scores: dict[int, float] = {}
        self.seen = 0

    @property
    def held(self) -> list[int]:
        return sorted(self.scores)

    def settle(self, least: int) -> None:
        """Where at least `least` tokens too many lie between sinks and recent window, the lowest scores go."""
        middle = {p: s for p, s in self.scores.items() if self.sinks <= p < self.seen - self.recent}
        if len(middle) >= self.heavy + least:
            winners = self.trace.best(middle, self.heavy)
            self.scores = {p: s for p, s in self.scores.items() if p not in middle or p in winners}

    def enter(self, position: int, score: float) -> None:
        """A new token enters the recent window; the one that it pushes out competes with the heavy hitters."""
        self.scores[position] = score
        self.seen = position + 1
        self.settle(self.every)


def h2o(
    row: Row, *, sinks: int, recent: int, heavy: int, every: int = 1, together: int = 1, renumber: bool = False
) -> Trace:
    """The score of a token is the attention probability it ever received, over all queries that were there and
    summed over the query heads of the group.

    After the prompt the `heavy` best tokens between sinks and recent window stay. A decoded token first reads
    everything held and itself, and that attention is added to the scores; then the oldest token of the recent window,
    which the new one pushed out, competes with the heavy hitters, and the lowest score goes (with `every` = n: when n
    are too many, the n lowest go).

    together: tokens that come after the prompt in one step, as in `h2o_streaming`; kept[i] is after step i.
    renumber: after the prompt keys are rotated by their place among what their kv head holds, queries by the next one.
    """
    output, probabilities = row.attention(row.prompt)
    trace = Trace(output)
    heads = [_Head(trace, sinks, recent, heavy, every) for _ in range(row.kv_heads)]
    for head, received in zip(heads, probabilities, strict=True):
        head.scores = dict(enumerate(received.sum(axis=(0, 1))))
        head.seen = row.prompt
        head.settle(1)
    trace.kept.append([head.held for head in heads])
    for start in range(row.prompt, row.tokens, together):
        trace.outputs += _advance(row, heads, range(start, min(start + together, row.tokens)), renumber)
        trace.kept.append([head.held for head in heads])
    return trace


def h2o_streaming(row: Row, *, sinks: int, recent: int, heavy: int, chunk: int) -> Trace:
    """The same from an empty cache: the prompt comes in chunks that read what is held and, causally, themselves.

    All attention of a chunk is added to the scores before its tokens enter, one after the other.
    """
    trace = Trace(np.zeros((row.prompt, *row.q.shape[1:])))
    heads = [_Head(trace, sinks, recent, heavy, 1) for _ in range(row.kv_heads)]
    for start in range(0, row.prompt, chunk):
        tokens = range(start, min(start + chunk, row.prompt))
        trace.prompt_output[tokens] = _advance(row, heads, tokens)
    trace.kept.append([head.held for head in heads])
    for t in range(row.prompt, row.tokens):
        trace.outputs += _advance(row, heads, [t])
        trace.kept.append([head.held for head in heads])
    return trace


def _advance(row: Row, heads: Sequence[_Head], tokens: Sequence[int], renumber: bool = False) -> list[np.ndarray]:
    """`tokens` read what is held and each other, leave their attention in the scores, and enter."""
    outputs, fresh = [], [dict.fromkeys(tokens, 0.0) for _ in heads]
    for t in tokens:
        seen = [[*head.held, *(p for p in tokens if p <= t)] for head in heads]
        output, rows = row.attend_held(t, seen, renumber=renumber)
        outputs.append(output)
        for head, own, positions, row_probabilities in zip(heads, fresh, seen, rows, strict=True):
            for position, received in zip(positions, row_probabilities.sum(axis=0), strict=True):
                scores = own if position in own else head.scores
                scores[position] += float(received)
    for head, own in zip(heads, fresh, strict=True):
        for position in tokens:
            head.enter(position, own[position])
    return outputs
