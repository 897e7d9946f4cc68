"""StreamingLLM (Xiao et al. 2023): the first tokens and the newest ones."""

from __future__ import annotations

from tests.oracles.row import Row, Trace


def kept_after(tokens: int, capacity: int, sinks: int) -> list[int]:
    """After `tokens` tokens: the `sinks` first and the capacity - sinks newest."""
    newest = range(max(0, tokens - (capacity - sinks)), tokens)
    return sorted(set(range(min(sinks, tokens))) | set(newest))


def streaming_llm(row: Row, *, capacity: int, sinks: int, renumber: bool) -> Trace:
    """A decoded token enters first and reads the `capacity` tokens that are then held, itself among them.

    renumber: keys are rotated by their place in the cache (sinks 0 .. sinks-1, then the window) and the query by
    the place of its own token, the last one; otherwise both by their original positions.
    """
    trace = Trace(row.attention(row.prompt)[0])
    trace.kept.append([kept_after(row.prompt, capacity, sinks)] * row.kv_heads)
    for t in range(row.prompt, row.tokens):
        kept = kept_after(t + 1, capacity, sinks)
        trace.outputs.append(row.attend_held(t, [kept] * row.kv_heads, renumber=renumber)[0])
        trace.kept.append([kept] * row.kv_heads)
    return trace
