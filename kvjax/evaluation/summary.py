"""From records to rows: what a comparison measured, with 95 % intervals.

A record is one measurement of one method on one task, context and seed. Its `score` is the mean over `examples`
generated examples, each in [0, 1]. The seeds only generate other examples, so all examples of a method and a task are
pooled and the interval is Wilson's for a proportion (Wilson, 1927), which keeps its coverage near 0 and 1; for scores
that are fractions it is wider than needed, never narrower. The mean over tasks takes its interval from those of the
tasks by the sum of squares (Newcombe, 1998; "MOVER").
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

Record = Mapping[str, Any]

Z95 = 1.959963984540054

#: Caches whose sizes differ by no more than this share count as equally large.
SAME_MEMORY = 0.02


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float

    def disjoint(self, other: Estimate) -> bool:
        """Whether the two intervals have no point in common."""
        return self.high < other.low or other.high < self.low


def same_memory(size: float, other: float) -> bool:
    """Whether two caches count as equally large."""
    return abs(size - other) <= SAME_MEMORY * other


@dataclasses.dataclass(frozen=True)
class Row:
    """One method at one context length, over all tasks and seeds.

    Attributes:
      questions: that were asked and scored, of all tasks and seeds together. texts: windows of text that were read.
      seeds: how many different ones.
      scores: per task, in [0, 1]; higher is better.
      score: the mean over tasks; None unless the method was measured on every scored task of this context.
      perplexity: per task that measures it.
      kl: nats per token from the full cache's next-token distribution to this one's; mean over tasks.
      attention_error: of the attention's output, relative to the full cache's; mean over tasks.
      cache_bytes: allocated, of one sequence, over all layers. effective_bytes: the part in use.
      bits_per_element: of the stored keys and values, scales counted.
      ratio: cache_bytes over those of the full bf16 cache. bytes_per_token: per token of the context.
      prefill_ms, decode_ms_per_token: medians.
      layer_bytes: cache_bytes by layer.
      notes: what the records say of themselves, such as "no-op".
    """

    method: str
    context: int
    questions: int
    texts: int
    seeds: int
    scores: dict[str, Estimate]
    score: Estimate | None
    perplexity: dict[str, float]
    kl: float | None
    attention_error: float | None
    cache_bytes: float
    bits_per_element: float | None
    effective_bytes: float | None
    bytes_per_token: float | None
    ratio: float
    prefill_ms: float | None
    decode_ms_per_token: float | None
    layer_bytes: tuple[float, ...]
    notes: tuple[str, ...]


class Point(NamedTuple):
    """A row that has a mean score, for plots and findings."""

    row: Row
    score: Estimate


def wilson(successes: float, trials: int) -> Estimate:
    """Wilson's 95 % score interval for `successes` (whole, or a sum of fractional scores) in `trials` > 0."""
    mean = successes / trials
    square = Z95**2 / trials
    centre = (mean + square / 2) / (1 + square)
    half = Z95 / (1 + square) * math.sqrt(mean * (1 - mean) / trials + square / (4 * trials))
    return Estimate(mean, min(max(centre - half, 0.0), mean), max(min(centre + half, 1.0), mean))


def difference(a: Estimate, b: Estimate) -> Estimate:
    """a - b of independent estimates, from the limits of both (Newcombe, 1998, "MOVER")."""
    mean = a.mean - b.mean
    below = math.hypot(a.mean - a.low, b.high - b.mean)
    above = math.hypot(a.high - a.mean, b.mean - b.low)
    return Estimate(mean, mean - below, mean + above)


def average(estimates: Sequence[Estimate]) -> Estimate:
    """The mean of independent estimates; the squared distances to the limits add up."""
    count = len(estimates)
    mean = sum(e.mean for e in estimates) / count
    below = math.sqrt(sum((e.mean - e.low) ** 2 for e in estimates)) / count
    above = math.sqrt(sum((e.high - e.mean) ** 2 for e in estimates)) / count
    return Estimate(mean, max(mean - below, 0.0), min(mean + above, 1.0))


def summarise(records: Iterable[Record]) -> list[Row]:
    """One row per method and context, in the order in which they first appear; contexts ascend.

    Where one method, task, context and seed was measured twice, the later record counts.
    """
    latest = {tuple(r.get(key) for key in ("method", "task", "context", "seed")): r for r in records}
    groups: dict[tuple[str, int], list[Record]] = {}
    for record in latest.values():
        groups.setdefault((record["method"], record["context"]), []).append(record)
    rows = [_row(method, context, members) for (method, context), members in groups.items()]
    tasks = {context: {task for row in group for task in row.scores} for context, group in by_context(rows).items()}
    rows = [_with_mean(row) if row.scores and set(row.scores) == tasks[row.context] else row for row in rows]
    return sorted(rows, key=lambda row: row.context)


def by_context(rows: Iterable[Row]) -> dict[int, list[Row]]:
    """The rows of each context length."""
    contexts: dict[int, list[Row]] = {}
    for row in rows:
        contexts.setdefault(row.context, []).append(row)
    return contexts


def points(rows: Iterable[Row]) -> list[Point]:
    """The rows that have a mean score."""
    return [Point(row, row.score) for row in rows if row.score is not None]


def frontier(candidates: Sequence[Point]) -> list[Point]:
    """The Pareto frontier, from the smallest cache up: what no other candidate beats.

    One beats another if it scores more in no more bytes, up to `SAME_MEMORY`, or as much in fewer bytes.
    """
    unbeaten = [point for point in candidates if not any(_beats(other, point) for other in candidates)]
    return sorted(unbeaten, key=lambda point: point.row.cache_bytes)


def _beats(one: Point, other: Point) -> bool:
    if one.score.mean > other.score.mean:
        return one.row.cache_bytes <= (1 + SAME_MEMORY) * other.row.cache_bytes
    return one.score.mean == other.score.mean and one.row.cache_bytes < other.row.cache_bytes


def names(values: Iterable[Iterable[str]]) -> list[str]:
    """All names in the order in which they first appear."""
    return list(dict.fromkeys(name for group in values for name in group))


def _row(method: str, context: int, records: Sequence[Record]) -> Row:
    tasks = dict.fromkeys(record["task"] for record in records)
    of_task = {task: [record for record in records if record["task"] == task] for task in tasks}
    layers = _column(records, "layer_bytes")
    return Row(
        method=method,
        context=context,
        questions=_examples(records, "score"),
        texts=_examples(records, "perplexity"),
        seeds=len({record.get("seed") for record in records}),
        scores={task: _score(group) for task, group in of_task.items() if _column(group, "score")},
        score=None,
        perplexity={
            task: statistics.fmean(known) for task, group in of_task.items() if (known := _column(group, "perplexity"))
        },
        kl=_mean(records, "kl"),
        attention_error=_mean(records, "attention_error"),
        bits_per_element=_mean(records, "bits_per_element"),
        cache_bytes=statistics.fmean(_column(records, "cache_bytes")),
        effective_bytes=_mean(records, "effective_bytes"),
        bytes_per_token=_mean(records, "bytes_per_token"),
        ratio=statistics.fmean(_column(records, "ratio")),
        prefill_ms=_median(records, "prefill_ms"),
        decode_ms_per_token=_median(records, "decode_ms_per_token"),
        layer_bytes=tuple(statistics.fmean(layer) for layer in zip(*layers, strict=True)),
        notes=tuple(dict.fromkeys(_column(records, "note"))),
    )


def _with_mean(row: Row) -> Row:
    return dataclasses.replace(row, score=average(list(row.scores.values())))


def _score(records: Sequence[Record]) -> Estimate:
    scored = [record for record in records if record.get("score") is not None]
    return wilson(sum(r["score"] * r["examples"] for r in scored), sum(r["examples"] for r in scored))


def _examples(records: Sequence[Record], measured: str) -> int:
    """Examples of the records that hold a measurement of this name."""
    return sum(record["examples"] for record in records if record.get(measured) is not None)


def _column(records: Sequence[Record], name: str) -> list[Any]:
    return [record[name] for record in records if record.get(name) not in (None, "", [])]


def _mean(records: Sequence[Record], name: str) -> float | None:
    known = _column(records, name)
    return statistics.fmean(known) if known else None


def _median(records: Sequence[Record], name: str) -> float | None:
    known = _column(records, name)
    return statistics.median(known) if known else None
