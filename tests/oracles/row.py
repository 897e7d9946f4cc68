"""What the transcriptions take and what they give."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from tests.oracles.attention import attend, causal
from tests.oracles.rotary import rotate, rotate_each


@dataclasses.dataclass(frozen=True)
class Row:
    """One sequence of one layer before rotary embedding.

    q: [T, N, H]. k, v: [T, K, H]. prompt: how many of the T tokens are the prompt; the others are decoded one by one.
    reads: the kv head of each query head; None means contiguous groups. window, softcap: of the layer's attention.
    """

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    prompt: int
    theta: float = 10000.0
    reads: Sequence[int] | None = None
    window: int | None = None
    softcap: float | None = None

    @property
    def tokens(self) -> int:
        return len(self.q)

    @property
    def kv_heads(self) -> int:
        return self.k.shape[1]

    @functools.cached_property
    def rotated(self) -> tuple[np.ndarray, np.ndarray]:
        """Queries and keys at their original positions."""
        positions = np.arange(self.tokens)
        return rotate_each(self.q, positions, self.theta), rotate_each(self.k, positions, self.theta)

    def attention(self, tokens: int) -> tuple[np.ndarray, list[np.ndarray]]:
        """Dense attention of the first `tokens` tokens: output [T, N, H], per kv head probabilities [G, T, T]."""
        q, k = (x[:tokens] for x in self.rotated)
        return causal(q, k, self.v[:tokens], reads=self.reads, window=self.window, softcap=self.softcap)

    def attend_held(
        self, t: int, held: Sequence[Sequence[int]], *, renumber: bool = False
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        """Token t over the tokens `held` by each kv head, itself among them as the last.

        Queries and keys are rotated by their positions or, with `renumber`, by their places in `held`, of which every
        head has the same number. Returns the output [N, H] and per kv head the probabilities [G, S_k], 0 where the
        sliding window ends before a token.
        """
        seen = [[p for p in positions if self.window is None or t - p < self.window] for positions in held]
        values = [self.v[positions, h] for h, positions in enumerate(seen)]
        if renumber:
            assert self.window is None
            places = np.arange(len(held[0]))
            query = rotate(self.q[t], places[-1], self.theta)
            keys = [rotate_each(self.k[positions, h], places, self.theta) for h, positions in enumerate(seen)]
        else:
            query = self.rotated[0][t]
            keys = [self.rotated[1][positions, h] for h, positions in enumerate(seen)]
        output, rows = attend(query, keys, values, reads=self.reads, softcap=self.softcap)
        probabilities = [np.zeros((len(row), len(positions))) for row, positions in zip(rows, held, strict=True)]
        for spread, row, positions, visible in zip(probabilities, rows, held, seen, strict=True):
            spread[:, np.isin(positions, visible)] = row
        return output, probabilities


@dataclasses.dataclass
class Trace:
    """What happened: outputs, and the kept positions over time.

    prompt_output: [P, N, H]. outputs: one [N, H] per decoded token.
    kept[i][h]: the positions that kv head h holds after the prompt (i = 0) and after decoded token i.
    gap: the smallest distance, relative to the larger, between a score that was kept and one that lost in the same
    comparison; below about 1e-6 another implementation may rightly choose otherwise.
    """

    prompt_output: np.ndarray
    outputs: list[np.ndarray] = dataclasses.field(default_factory=list)
    kept: list[list[list[int]]] = dataclasses.field(default_factory=list)
    gap: float = np.inf

    def best(self, scores: dict[int, float], places: int) -> list[int]:
        """The `places` positions with the largest scores, sorted by position; remembers the gap at the cut."""
        order = sorted(scores, key=lambda position: -scores[position])
        if 0 < places < len(order):
            worst_kept, best_lost = scores[order[places - 1]], scores[order[places]]
            self.gap = min(self.gap, (worst_kept - best_lost) / max(abs(worst_kept), abs(best_lost), 1e-300))
        return sorted(order[:places])
