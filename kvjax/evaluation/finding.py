"""What a comparison shows, in sentences that its intervals bear."""

from __future__ import annotations

from collections.abc import Sequence

from kvjax.evaluation.summary import SAME_MEMORY, Estimate, Point, Row, points

#: Floors and ceilings: every table has them, and beating them is no finding.
BASELINES = ("full", "random", "streaming_llm")

MOST_NAMED = 4


def findings(rows: Sequence[Row]) -> list[str]:
    """One to three sentences about the longest context; none where no method has a mean score."""
    scored = points(rows)
    longest = max((point.row.context for point in scored), default=0)
    scored = [point for point in scored if point.row.context == longest]
    full = next((point for point in scored if point.row.method == "full"), None)
    said = [_same_memory(scored)]
    if full is not None:
        others = [point for point in scored if point is not full]
        said += [_smallest_unharmed(full, others), _harmed(full, others)]
    sentences = [sentence for sentence in said if sentence]
    if sentences and len({row.context for row in rows}) > 1:
        sentences[0] += f" (At {longest:,} tokens.)"
    return sentences


def percent(share: float) -> str:
    """A share as text: "97 %", with one digit more below ten."""
    return f"{100 * share:.0f} %" if share >= 0.0995 or share == 0 else f"{100 * share:.1f} %"


def interval(score: Estimate) -> str:
    """ "97 % (95–98)": the mean and the limits of its interval."""
    return f"{100 * score.mean:.0f} % ({100 * score.low:.0f}–{100 * score.high:.0f})"


def _same_memory(scored: Sequence[Point]) -> str | None:
    """The group of equally large caches whose scores lie furthest apart."""
    rivals = [point for point in scored if point.row.method.split(":")[0] not in BASELINES]
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


def _equally_large(point: Point, anchor: Point) -> bool:
    return abs(point.row.cache_bytes - anchor.row.cache_bytes) <= SAME_MEMORY * anchor.row.cache_bytes


def _smallest_unharmed(full: Point, others: Sequence[Point]) -> str:
    """The smallest cache whose score is not below full's by more than chance."""
    unharmed = [p for p in others if p.score.high >= full.score.low and p.row.ratio < full.row.ratio]
    if not unharmed:
        return "No smaller cache keeps the score of the full one."
    point = min(unharmed, key=lambda point: point.row.ratio)
    return (
        f"The smallest cache that scores like the full one, within the intervals, is {point.row.method}: "
        f"{full.row.ratio / point.row.ratio:.1f}× smaller, {interval(point.score)} against {interval(full.score)}."
    )


def _harmed(full: Point, others: Sequence[Point]) -> str | None:
    if not others:
        return None
    harmed = [point for point in others if point.score.high < full.score.low]
    return f"{len(harmed)} of {len(others)} methods score below the full cache by more than chance explains."
