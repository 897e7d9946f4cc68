from __future__ import annotations

import pytest

from kvjax.evaluation.headline import difference, headline
from kvjax.evaluation.summary import Estimate, summarise, wilson


def records(scores: dict[str, float], sizes: dict[str, int] | None = None, examples: int = 200):
    sizes = sizes or {}
    return [
        {
            "method": name,
            "task": task,
            "context": context,
            "seed": seed,
            "score": score,
            "examples": examples,
            "cache_bytes": sizes.get(name, 1000),
            "ratio": sizes.get(name, 1000) / 3000,
            "layer_bytes": [],
        }
        for name, score in scores.items()
        for task in ("needle", "kv")
        for context in (512, 1024)
        for seed in (0, 1)
    ]


def test_the_best_rival_of_equal_bytes_is_named_with_what_it_loses():
    rows = summarise(records({"int4": 0.95, "h2o": 0.30, "snapkv": 0.40, "big": 0.9}, {"big": 2000}))
    said = headline(rows, "int4", ("h2o", "snapkv", "big"))
    assert said.startswith(
        "At int4's own bytes, 33 % of the full cache, snapkv, the best of 2 that evict, loses 55 points"
    )
    low, high = (float(x) for x in said.split("interval ")[1].split(")")[0].split(" to "))
    assert 50 <= low < 55 < high <= 60
    assert "40 % (" in said and "95 % (" in said


def test_overlapping_intervals_are_not_a_finding():
    rows = summarise(records({"int4": 0.52, "h2o": 0.5}, examples=20))
    assert "cannot be told apart" in headline(rows, "int4", ("h2o",))


def test_a_rival_that_keeps_more_is_said_to():
    said = headline(summarise(records({"int4": 0.2, "h2o": 0.9})), "int4", ("h2o",))
    assert "h2o keeps 70 points" in said and "int4 loses" in said


def test_other_bytes_are_not_compared():
    rows = summarise(records({"int4": 0.95, "h2o": 0.30}, {"h2o": 1021}))
    assert headline(rows, "int4", ("h2o",)) == "No method that evicts takes the bytes of int4 within 2.0 %."
    assert "has no score" in headline(rows, "int8", ("h2o",))


@pytest.mark.parametrize(("hits", "other"), [(95, 30), (60, 55), (100, 0)])
def test_the_interval_of_a_difference_covers_it_and_shrinks_with_more_examples(hits, other):
    few, many = (difference(wilson(n * hits, n * 100), wilson(n * other, n * 100)) for n in (1, 100))
    assert few.low <= many.low <= (hits - other) / 100 <= many.high <= few.high
    if wilson(hits, 100).disjoint(wilson(other, 100)):
        assert few.low > 0


def test_a_difference_of_certainties_is_certain():
    assert difference(Estimate(1, 1, 1), Estimate(0.25, 0.25, 0.25)) == Estimate(0.75, 0.75, 0.75)
