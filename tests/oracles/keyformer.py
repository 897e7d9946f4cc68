"""Keyformer (Adnan et al. 2024): H2O whose scores are Gumbel-softmax probabilities with a rising temperature.

Published for multi-head attention; here the query heads of a group add up, as in H2O. The released code also adds up
over the rows of a batch; here every row is alone.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.oracles.attention import contiguous
from tests.oracles.row import Row, Trace

Temperature = Callable[[int], float]


def temperature(*, start: float, end: float, generated: int) -> Temperature:
    """start + step · (end - start) / generated; step 0 is the prompt, step i the i-th decoded token (1 -> 2)."""
    return lambda step: start + step * (end - start) / generated


def places(*, prompt: int, share: float, recent: float) -> tuple[int, int]:
    """Recent tokens and key tokens: floor(share · prompt) in all (0.6), of which floor(recent · all) recent (0.3)."""
    whole = int(np.floor(share * prompt))
    newest = int(np.floor(recent * whole))
    return newest, whole - newest


def gumbel_softmax(probabilities: np.ndarray, noise: np.ndarray, tau: float) -> np.ndarray:
    """softmax((x + noise) / tau) of the logits x [S] that have these (positive) probabilities [S]."""
    y = (np.log(probabilities) + noise) / tau
    weights = np.exp(y - y.max())
    return weights / weights.sum()


def _received(
    row: Row, probabilities: list[np.ndarray], t: int, held: list[list[int]], noise: np.ndarray, tau: float
) -> list[np.ndarray]:
    """What the query of token t adds to the scores of the tokens that each kv head holds: [S_k] each.

    probabilities: per kv head [G, S_k]. noise: [N, T, T] by query head, query and key.
    """
    reads = list(row.reads or contiguous(row.q.shape[1], row.kv_heads))
    added = []
    for h, (positions, group) in enumerate(zip(held, probabilities, strict=True)):
        heads = [n for n, read in enumerate(reads) if read == h]
        draws = [noise[n, t, positions] for n in heads]
        added.append(sum(gumbel_softmax(p, g, tau) for p, g in zip(group, draws, strict=True)))
    return [np.asarray(x) for x in added]


def _prompt_scores(row: Row, probabilities: list[np.ndarray], noise: np.ndarray, tau: float) -> list[np.ndarray]:
    scores = [np.zeros(row.tokens) for _ in probabilities]
    for t in range(row.prompt):
        seen = [list(range(t + 1))] * row.kv_heads
        added = _received(row, [p[:, t, : t + 1] for p in probabilities], t, seen, noise, tau)
        for score, add in zip(scores, added, strict=True):
            score[: t + 1] += add
    return scores


def keyformer(row: Row, *, recent: int, key: int, tau: Temperature, noise: np.ndarray) -> Trace:
    """As described. noise [N, T, T]: the Gumbel draw of each query head, query and key; zeros for "no noise".

    The score of a token is the sum, over all queries that read it, of softmax((logits + noise) / tau) over what that
    query read. After the prompt the `recent` newest and, of the others, the `key` best stay. A decoded token reads what
    is held and itself with the ordinary softmax, adds to the scores, enters the window, and the key tokens are chosen
    again among what is held: the one that leaves the window competes, and the lowest score goes for good.
    """
    assert row.window is None
    output, probabilities = row.attention(row.prompt)
    trace = Trace(output)
    scores = _prompt_scores(row, probabilities, noise, tau(0))
    held = [list(range(row.prompt))] * row.kv_heads
    for t in range(row.prompt - 1, row.tokens):
        if t >= row.prompt:
            held = [[*positions, t] for positions in held]
            output, rows = row.attend_held(t, held)
            trace.outputs.append(output)
            added = _received(row, rows, t, held, noise, tau(t + 1 - row.prompt))
            for score, positions, add in zip(scores, held, added, strict=True):
                score[positions] += add
        kept = []
        for score, positions in zip(scores, held, strict=True):
            older = {p: float(score[p]) for p in positions if p <= t - recent}
            kept.append([*trace.best(older, key), *(p for p in positions if p > t - recent)])
        held = kept
        trace.kept.append(held)
    return trace


def keyformer_released(row: Row, *, recent: int, key: int, tau: Temperature, noise: np.ndarray) -> Trace:
    """As in the released GPT-J, Cerebras and MPT code, mask by mask, for one row.

    The mask made after token t has a place for token t + 1 too, and its `recent` last places are open, so that they
    are tokens t + 2 - recent .. t + 1; the key tokens are chosen among the tokens up to t - recent. Token
    t + 1 - recent is in neither set, and a closed place is never opened again: whatever leaves the window is lost, and
    the key tokens are those of the prompt for ever. Scores of closed places are set to 0. Nothing is closed while
    there are at most recent + key tokens.
    """
    assert row.window is None
    output, probabilities = row.attention(row.prompt)
    trace = Trace(output)
    scores = _prompt_scores(row, probabilities, noise, tau(0))
    opened = [np.ones(row.prompt, bool) for _ in range(row.kv_heads)]
    for t in range(row.prompt - 1, row.tokens):
        if t >= row.prompt:
            held = [[int(p) for p in np.flatnonzero(mask)] for mask in opened]
            output, rows = row.attend_held(t, held)
            trace.outputs.append(output)
            added = _received(row, rows, t, held, noise, tau(t + 1 - row.prompt))
            for score, positions, add in zip(scores, held, added, strict=True):
                score[positions] += add
        for h, score in enumerate(scores):
            mask = np.ones(t + 2, bool)
            if t + 1 > recent + key:
                competing = t + 1 - recent
                if recent:
                    mask[: t + 2 - recent] = False
                order = trace.best({p: float(score[p]) for p in range(competing)}, key) if key else []
                mask[order] = True
            mask[: t + 1] &= opened[h]
            opened[h] = mask
            score[: t + 1] *= mask[: t + 1]
        trace.kept.append([[int(p) for p in np.flatnonzero(mask[: t + 1])] for mask in opened])
    return trace
