"""Which contests are held: the sizes that were asked for, or a few that suit the device."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from experiments.bench import beside, decode
from experiments.bench.contest import Contest
from experiments.bench.decode import Size
from kvjax.errors import UsageError
from pallas_kernels.cache_update.specs import HARDWARE

GOAL = Size(4, 4096)
"""What the goals on a CPU are stated for."""

ON_CPU = (Size(1, 2048), GOAL, Size(1, 32768))
ON_ACCELERATOR = (
    *(Size(batch, context) for batch in (1, 4, 8, 32) for context in (2048, 8192, 32768, 131072)),
    Size(8, 8192, query_heads=64),
    Size(8, 8192, head_dim=64),
    Size(32, 32768, query_heads=64),
)
PROMPTS = {"cpu": (1024,), "accelerator": (2048, 8192)}
"""Tokens of a prompt."""

LAST = 64
"""Queries that score a prompt where not all do."""


def sizes(batch: Sequence[int], context: Sequence[int], heads: Sequence[str], head_dim: Sequence[int]) -> list[Size]:
    """Every combination; what is empty is what the goals are stated for.

    Raises:
      UsageError: a pair of head counts is not "queries:kv" with a whole number of queries per kv head.
    """
    pairs = [_pair(text) for text in heads] or [(GOAL.query_heads, GOAL.kv_heads)]
    grid = itertools.product(pairs, head_dim or [GOAL.head_dim], batch or [GOAL.batch], context or [GOAL.context])
    return [Size(b, s, n, k, h) for (n, k), h, b, s in grid]


def contests(
    ops: Sequence[str], chosen: Sequence[Size], formats: Sequence[str], rivals: Sequence[str], platform: str
) -> Iterator[Contest]:
    """The contests of some ops ("decode", "prefill", "mass", "update"), at the chosen sizes or the usual ones."""
    where = "cpu" if platform == "cpu" else "accelerator"
    usual = ON_CPU if where == "cpu" else ON_ACCELERATOR
    prompts = chosen or [Size(1, tokens) for tokens in PROMPTS[where]]
    if "decode" in ops:
        yield from (decode.contest(size, formats, rivals) for size in chosen or usual)
    if "prefill" in ops:
        yield from (beside.prefill(size) for size in prompts)
    if "mass" in ops:
        scored = prompts if chosen else [Size(1, size.context * n) for size in prompts for n in (1, 2)]
        yield from (beside.mass(size, size.context) for size in scored)
        yield from (beside.mass(size, LAST) for size in scored[-1:] if size.context > LAST)
    if "update" in ops:
        yield from (beside.update(spec) for spec in HARDWARE)


def _pair(text: str) -> tuple[int, int]:
    parts = text.split(":")
    if len(parts) != 2 or not all(part.isdigit() and int(part) for part in parts) or int(parts[0]) % int(parts[1]):
        raise UsageError(f"heads are written as queries:kv, like 32:8, queries a multiple of kv; not {text!r}")
    return int(parts[0]), int(parts[1])
