"""What a comparison shows, in sentences that its intervals bear."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from kvjax.evaluation.defaults import BASELINES, REFERENCE
from kvjax.evaluation.figure import interval, percent
from kvjax.evaluation.summary import Estimate, Point, Row, difference, points, same_memory

MOST_NAMED = 4

NEAR = 0.1
"""Loss of score up to which a smaller cache is called as good as the full one."""


def findings(rows: Sequence[Row], config: Mapping[str, Any]) -> list[str]:
    """One to three sentences about the longest context; none where no method has a mean score.

    Args:
      config: what was compared; `budget` and `budgeted` are read where present (see `Plan.config`).
    """
    scored = points(rows)
    longest = max((point.row.context for point in scored), default=0)
    scored = [point for point in scored if point.row.context == longest]
    said = [headline(scored, config.get("budget"), config.get("budgeted", ())) or _same_memory(scored)]
    full = next((point for point in scored if point.row.method == REFERENCE), None)
    if full is not None:
        others = [point for point in scored if point is not full]
        said += (
            [blind] if (blind := _blind(full, others)) else [_smallest_unharmed(full, others), _harmed(full, others)]
        )
    sentences = [sentence for sentence in said if sentence]
    if sentences and len({row.context for row in rows}) > 1:
        sentences[0] += f" (At {longest:,} tokens.)"
    return sentences


def headline(scored: Sequence[Point], keeper: str | None, budgeted: Collection[str]) -> str | None:
    """What the best of the methods that were given the bytes of `keeper` loses of what it keeps.

    None where one of the two sides has no score, or their bytes differ.
    """
    best = next((point for point in scored if point.row.method == keeper), None)
    if best is None:
        return None
    rivals = [p for p in scored if p.row.method in budgeted and not _is_baseline(p) and _equally_large(p, best)]
    if not rivals:
        return None
    rival = max(rivals, key=lambda point: point.score.mean)
    among = f", the best of {len(rivals)} that evict," if len(rivals) > 1 else ""
    scores = (
        f"With the same memory, {percent(best.row.ratio)} of the full cache, {keeper} answers {interval(best.score)} "
        f"right and {rival.row.method}{among} {interval(rival.score)}"
    )
    if not rival.score.disjoint(best.score):
        return f"{scores}; these intervals do not tell them apart."
    gap = difference(rival.score, best.score)
    return f"{scores}: {100 * abs(gap.mean):.0f} points {'more' if gap.mean > 0 else 'less'} ({_range(gap)})."


def _range(gap: Estimate) -> str:
    low, high = sorted(100 * abs(limit) for limit in (gap.low, gap.high))
    return f"95 % interval {low:.0f} to {high:.0f}"


def _same_memory(scored: Sequence[Point]) -> str | None:
    """The group of equally large caches whose scores lie furthest apart."""
    rivals = [point for point in scored if not _is_baseline(point)]
    groups = [[p for p in rivals if _equally_large(p, anchor)] for anchor in rivals]
    ranked = [sorted(group, key=lambda point: -point.score.mean) for group in groups]
    telling = [group for group in ranked if group[0].score.disjoint(group[-1].score)]
    if not telling:
        return None
    best, *others = max(telling, key=lambda group: group[0].score.mean - group[-1].score.mean)
    others = others[: MOST_NAMED - 2] + others[-1:] if len(others) >= MOST_NAMED else others
    listed = ", ".join(f"{point.row.method} {interval(point.score)}" for point in others)
    return (
        f"In {percent(best.row.ratio)} of the full cache's memory {best.row.method} gets {interval(best.score)} right; "
        f"{listed}."
    )


def _is_baseline(point: Point) -> bool:
    return point.row.method.split(":")[0] in BASELINES


def _equally_large(point: Point, anchor: Point) -> bool:
    return same_memory(point.row.cache_bytes, anchor.row.cache_bytes)


def _blind(full: Point, others: Sequence[Point]) -> str | None:
    """That the tasks are too hard for the model, or the budgets too large, for methods to differ."""
    floor = next((p for p in others if _is_baseline(p) and p.score.high >= full.score.low), None)
    if floor is None:
        return None
    return (
        f"Even {floor.row.method} scores like the full cache, {interval(floor.score)} against {interval(full.score)}: "
        "here these tasks do not tell methods apart."
    )


def _smallest_unharmed(full: Point, others: Sequence[Point]) -> str:
    """The smallest cache that is shown to lose little; overlapping intervals show nothing where they are wide."""
    near = f"within {100 * NEAR:.0f} points of the full one"
    smaller = [p for p in others if p.row.ratio < full.row.ratio]
    unharmed = [p for p in smaller if difference(p.score, full.score).low >= -NEAR]
    if not unharmed:
        return f"No smaller cache is shown to score {near}."
    point = min(unharmed, key=lambda point: point.row.ratio)
    return (
        f"The smallest cache that is shown to score {near} is {point.row.method}: "
        f"{full.row.ratio / point.row.ratio:.1f}× smaller, {interval(point.score)} against {interval(full.score)}."
    )


def _harmed(full: Point, others: Sequence[Point]) -> str | None:
    if not others:
        return None
    harmed = [point for point in others if point.score.high < full.score.low]
    return f"{len(harmed)} of {len(others)} methods score below the full cache by more than chance explains."
