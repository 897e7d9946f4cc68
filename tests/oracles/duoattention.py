"""DuoAttention (Xiao et al. 2024): some kv heads keep everything, the others only sinks and recent tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from tests.oracles.row import Row, Trace
from tests.oracles.streaming_llm import kept_after


def full_heads(gates: np.ndarray, *, share: float) -> np.ndarray:
    """Gates [L, K] after training -> which heads are full, [L, K]: those not below the quantile 1 - share of all gates
    (linear interpolation; equal gates at the quantile are all full)."""
    return gates >= np.quantile(gates, 1 - share)


def gated(full: np.ndarray, streaming: np.ndarray, gates: np.ndarray, reads: Sequence[int]) -> np.ndarray:
    """What training sees: outputs [T, N, H] of full and of streaming attention, mixed by gates [K] in [0, 1]."""
    alpha = np.array([gates[h] for h in reads])[None, :, None]
    return alpha * full + (1 - alpha) * streaming


def duo(
    row: Row,
    full: Sequence[bool],
    *,
    sinks: int,
    recent: int,
    chunk: int | None,
    leaves: Literal["before", "after"],
) -> Trace:
    """full: by kv head. Positions are the original ones.

    A streaming head holds the first `sinks` and the `recent` newest tokens. A decoded token enters, and what it pushes
    out leaves before it reads (so that it reads sinks + recent tokens, itself among them) or after.
    chunk: None attends to the prompt exactly; otherwise it comes in chunks of this many tokens, which in a streaming
    head read what is held from before the chunk and, causally, the chunk; the cut comes after the chunk.
    """
    trace = Trace(np.zeros((row.prompt, *row.q.shape[1:])))

    def held(head: int, tokens: int) -> list[int]:
        return list(range(tokens)) if full[head] else kept_after(tokens, sinks + recent, sinks)

    heads = range(row.kv_heads)
    if chunk is None:
        trace.prompt_output = row.attention(row.prompt)[0]
    else:
        for t in range(row.prompt):
            start = t - t % chunk
            trace.prompt_output[t] = row.attend_held(t, [[*held(h, start), *range(start, t + 1)] for h in heads])[0]
    trace.kept.append([held(h, row.prompt) for h in heads])
    for t in range(row.prompt, row.tokens):
        after = [held(h, t + 1) for h in heads]
        seen = after if leaves == "before" else [[*held(h, t), t] for h in heads]
        trace.outputs.append(row.attend_held(t, seen)[0])
        trace.kept.append(after)
    return trace
