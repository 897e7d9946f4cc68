"""MiKV, "No Token Left Behind" (Yang et al. 2024, arXiv 2402.18096): what others evict is kept in few bits.

No official code exists; this follows two re-implementations and notes. Whether the size of the high tier is a share of
the current length or fixed by the prompt is open there, and so is what a quantised high tier is demoted from: here the
size is a function that the test gives, and a demoted token is coded from what the high tier holds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from tests.oracles.attention import contiguous
from tests.oracles.quantised import Coded, encode
from tests.oracles.row import Row, Trace


def balancer(q: np.ndarray, k: np.ndarray, reads: list[int], *, floor: float) -> np.ndarray:
    """Rotated q [P, N, H], k [P, K, H] of the prompt -> [K, H]: sqrt(max |q| / max |k|), eq. 2.

    Maxima over the prompt and, for q, over the query heads of the group; none counts as less than `floor`.
    """
    out = np.zeros(k.shape[1:])
    for head in range(k.shape[1]):
        group = [n for n, read in enumerate(reads) if read == head]
        queries = np.abs(q[:, group]).max(axis=(0, 1))
        keys = np.abs(k[:, head]).max(axis=0)
        out[head] = np.sqrt(np.maximum(queries, floor) / np.maximum(keys, floor))
    return out


@dataclasses.dataclass
class MikvTrace(Trace):
    """kept[i][h]: the positions of the high tier. All other tokens are in the low one.

    balancer: [K, H]. keys[h], values[h]: all T tokens of kv head h as the low tier codes them (keys: of k · balancer).
    received[h]: the score [T] of each token in the end.
    """

    balancer: np.ndarray = dataclasses.field(default_factory=lambda: np.ones(0))
    keys: list[Coded] = dataclasses.field(default_factory=list)
    values: list[Coded] = dataclasses.field(default_factory=list)
    received: list[np.ndarray] = dataclasses.field(default_factory=list)


def mikv(
    row: Row,
    *,
    places: Callable[[int], int],
    recent: int,
    low_bits: int,
    high_bits: int | None,
    balanced: bool,
    floor: float,
) -> MikvTrace:
    """places(tokens): size of the high tier once `tokens` tokens are cached; the `recent` newest are always in it.

    The score of a token is the attention probability it ever received, over all queries that were there and summed
    over the query heads of the group. Prompt attention is exact; then the tiers are formed. A decoded token enters the
    high tier and reads both tiers and itself; its attention is added to the scores; then, while the high tier is
    larger than places(tokens), the lowest score outside the recent window goes to the low tier for good.

    Low tier: per token, asymmetric, groups of H / 2 channels; keys times the balancer (1 where not `balanced`), which
    the queries are divided by; values plain. high_bits: the same quantiser without a balancer; None keeps it exact.
    """
    assert row.window is None
    q, k = row.rotated
    heads, half = range(row.kv_heads), q.shape[-1] // 2
    reads = list(row.reads or contiguous(q.shape[1], row.kv_heads))
    output, probabilities = row.attention(row.prompt)
    by = balancer(q[: row.prompt], k[: row.prompt], reads, floor=floor) if balanced else np.ones(k.shape[1:])
    high_keys, high_values = (_high(x, high_bits, half) for x in (k, row.v))
    trace = MikvTrace(output, balancer=by)
    trace.keys = [encode(high_keys[:, h] * by[h], low_bits, half, 1) for h in heads]
    trace.values = [encode(high_values[:, h], low_bits, half, 1) for h in heads]
    trace.received = [np.zeros(row.tokens) for _ in heads]
    for h in heads:
        trace.received[h][: row.prompt] = probabilities[h].sum(axis=(0, 1))
    high = [_stay(trace, h, list(range(row.prompt)), row.prompt, recent, places(row.prompt)) for h in heads]
    trace.kept.append(high)
    for t in range(row.prompt, row.tokens):
        high = [[*positions, t] for positions in high]
        outputs = []
        for n, h in enumerate(reads):
            logits = np.zeros(t + 1)
            values = np.zeros((t + 1, q.shape[-1]))
            for p in range(t + 1):
                if p in high[h]:
                    logits[p], values[p] = q[t, n] @ high_keys[p, h], high_values[p, h]
                else:
                    logits[p] = (q[t, n] / by[h]) @ trace.keys[h].decoded[p]
                    values[p] = trace.values[h].decoded[p]
            logits = logits / np.sqrt(q.shape[-1])
            if row.softcap is not None:
                logits = row.softcap * np.tanh(logits / row.softcap)
            weights = np.exp(logits - logits.max())
            weights = weights / weights.sum()
            trace.received[h][: t + 1] += weights
            outputs.append(weights @ values)
        trace.outputs.append(np.stack(outputs))
        high = [_stay(trace, h, high[h], t + 1, recent, places(t + 1)) for h in heads]
        trace.kept.append(high)
    return trace


def _stay(trace: MikvTrace, head: int, held: list[int], tokens: int, recent: int, places: int) -> list[int]:
    """The positions of the high tier that stay in it: the recent ones, and the best of the others."""
    if len(held) <= places:
        return held
    newest = [p for p in held if p >= tokens - recent]
    older = {p: float(trace.received[head][p]) for p in held if p < tokens - recent}
    return sorted([*trace.best(older, max(0, places - len(newest))), *newest])


def _high(x: np.ndarray, bits: int | None, group: int) -> np.ndarray:
    """x [T, K, H] as the high tier holds it."""
    if bits is None:
        return x
    return np.stack([encode(x[:, h], bits, group, 1).decoded for h in range(x.shape[1])], axis=1)
