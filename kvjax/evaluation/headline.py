"""The one sentence that a comparison at equal bytes is made for."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from kvjax.evaluation.finding import SAME_MEMORY, interval, percent
from kvjax.evaluation.summary import Estimate, Point, Row, points


def difference(a: Estimate, b: Estimate) -> Estimate:
    """a - b with its 95 % interval, from the limits of both (Newcombe, 1998, "MOVER")."""
    mean = a.mean - b.mean
    below = math.hypot(a.mean - a.low, b.high - b.mean)
    above = math.hypot(a.high - a.mean, b.mean - b.low)
    return Estimate(mean, mean - below, mean + above)


def headline(rows: Sequence[Row], keeper: str, rivals: Collection[str]) -> str:
    """What the best of the rivals loses of what `keeper` keeps, where both take the same bytes; at the longest context.

    Says so where the intervals overlap, where no rival takes the same bytes, or where `keeper` has no score.
    """
    scored = points(rows)
    longest = max((point.row.context for point in scored), default=0)
    here = {point.row.method: point for point in scored if point.row.context == longest}
    if keeper not in here:
        return f"{keeper} has no score, so nothing can be said about its bytes."
    best = here[keeper]
    equal = [p for name, p in here.items() if name in rivals and _same_bytes(p, best)]
    if not equal:
        return f"No method that evicts takes the bytes of {keeper} within {percent(SAME_MEMORY)}."
    rival = max(equal, key=lambda point: point.score.mean)
    bytes_ = f"At {keeper}'s own bytes, {percent(best.row.ratio)} of the full cache,"
    both = f"{interval(rival.score)} against {interval(best.score)}"
    if not rival.score.disjoint(best.score):
        return f"{bytes_} {rival.row.method} and {keeper} cannot be told apart: {both}."
    gap = difference(best.score, rival.score)
    points_ = f"{100 * abs(gap.mean):.0f} points (95 % interval {_range(gap)})"
    if gap.mean < 0:
        return f"{bytes_} {rival.row.method} keeps {points_} of retrieval that {keeper} loses: {both}."
    among = f", the best of {len(equal)} that evict," if len(equal) > 1 else ""
    return f"{bytes_} {rival.row.method}{among} loses {points_} of retrieval that {keeper} keeps: {both}."


def _same_bytes(a: Point, b: Point) -> bool:
    return abs(a.row.cache_bytes - b.row.cache_bytes) <= SAME_MEMORY * b.row.cache_bytes


def _range(gap: Estimate) -> str:
    low, high = sorted(100 * abs(limit) for limit in (gap.low, gap.high))
    return f"{low:.0f} to {high:.0f}"
