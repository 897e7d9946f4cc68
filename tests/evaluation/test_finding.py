"""Sentences say what the intervals bear, and nothing else."""

from __future__ import annotations

import itertools

import pytest

from kvjax.evaluation.finding import findings
from kvjax.evaluation.summary import Estimate, difference, summarise, wilson

FULL_BYTES = 3000
BUDGET = {"budget": "int4", "budgeted": ["random", "streaming_llm", "h2o", "snapkv", "big"]}


def rows(scores: dict[str, float], sizes: dict[str, int] | None = None, examples: int = 200, contexts=(512, 1024)):
    sizes = sizes or {}
    records = [
        {
            "method": name,
            "task": task,
            "context": context,
            "seed": seed,
            "score": scores[name],
            "examples": examples,
            "cache_bytes": sizes.get(name, 1000),
            "ratio": sizes.get(name, 1000) / FULL_BYTES,
            "layer_bytes": [],
        }
        for name, task, context, seed in itertools.product(scores, ("needle", "kv"), contexts, (0, 1))
    ]
    return summarise(records)


def test_the_best_rival_of_equal_bytes_is_named_with_what_it_loses():
    measured = rows({"int4": 0.95, "h2o": 0.30, "snapkv": 0.40, "big": 0.9, "kivi-2": 0.7}, {"big": 2000})
    said = findings(measured, BUDGET)[0]
    assert said.startswith("With the same memory, 33 % of the full cache, int4 answers 95 % (")
    assert "and snapkv, the best of 2 that evict, 40 % (" in said and ": 55 points less (95 % interval " in said
    low, high = (float(x) for x in said.split("interval ")[1].split(")")[0].split(" to "))
    assert 50 <= low < 55 < high <= 60
    assert said.endswith("(At 1,024 tokens.)")


def test_overlapping_intervals_are_not_a_finding():
    said = findings(rows({"int4": 0.52, "h2o": 0.5}, examples=20), BUDGET)[0]
    assert "do not tell them apart" in said and "points" not in said


def test_a_rival_that_keeps_more_is_said_to():
    assert ": 70 points more (" in findings(rows({"int4": 0.2, "h2o": 0.9}), BUDGET)[0]


def test_a_floor_is_no_rival():
    assert findings(rows({"int4": 0.9, "random": 0.3, "streaming_llm": 0.2}), BUDGET) == []


@pytest.mark.parametrize(
    ("scores", "sizes", "config"),
    [
        ({"int4": 0.95, "h2o": 0.30}, {"h2o": 1021}, BUDGET),
        ({"int8": 0.95, "h2o": 0.95}, {}, BUDGET),
        ({"int4": 0.95, "h2o": 0.95}, {}, {"budget": "50%", "budgeted": ["h2o"]}),
    ],
    ids=["other bytes", "no score", "no method's bytes"],
)
def test_only_equal_bytes_are_compared(scores, sizes, config):
    assert findings(rows(scores, sizes), config) == []


SIZES = {"full": 3000, "int8": 1600}
SCORES = {"full": 0.96, "random": 0.22, "streaming_llm": 0.2, "snapkv": 0.4, "int4": 0.95, "int8": 0.96}


def test_without_a_common_budget_the_finding_compares_equally_large_caches():
    said = findings(rows(SCORES, SIZES, contexts=(1024,)), {})
    assert said[0].startswith("In 33 % of the full cache's memory int4 gets 95 % (")
    assert "snapkv 40 %" in said[0]
    assert "random" not in said[0] and "streaming_llm" not in said[0]
    assert "is int4: 3.0× smaller" in said[1]
    assert said[2].startswith("3 of 5 methods")


def test_no_finding_where_intervals_overlap_or_sizes_differ():
    assert findings(rows({"int4": 0.52, "snapkv": 0.48}, examples=50), {}) == []
    assert findings(rows({"int4": 0.95, "snapkv": 0.4}, {"snapkv": 1100}), {}) == []


@pytest.mark.parametrize(("full", "random"), [(0.03, 0.0), (0.97, 0.95)])
def test_where_a_floor_scores_like_the_full_cache_nothing_is_concluded(full, random):
    said = findings(rows({"full": full, "random": random, "int4": full}, SIZES, examples=10), {})
    assert len(said) == 1 and said[0].startswith("Even random scores like the full cache")


def test_few_examples_show_nothing():
    """Four right of four and one of four have overlapping intervals, which is no reason to call them alike."""
    said = findings(rows({"full": 1.0, "snapkv": 0.5}, SIZES, examples=1, contexts=(1024,)), {})
    assert said[0] == "No smaller cache is shown to score within 10 points of the full one."


def test_that_nothing_keeps_the_score_is_said():
    assert "No smaller cache" in findings(rows({"full": 0.96, "snapkv": 0.4}, SIZES), {})[0]


@pytest.mark.parametrize(("hits", "other"), [(95, 30), (60, 55), (100, 0)])
def test_the_interval_of_a_difference_covers_it_and_shrinks_with_more_examples(hits, other):
    few, many = (difference(wilson(n * hits, n * 100), wilson(n * other, n * 100)) for n in (1, 100))
    assert few.low <= many.low <= (hits - other) / 100 <= many.high <= few.high
    if wilson(hits, 100).disjoint(wilson(other, 100)):
        assert few.low > 0


def test_a_difference_of_certainties_is_certain():
    assert difference(Estimate(1, 1, 1), Estimate(0.25, 0.25, 0.25)) == Estimate(0.75, 0.75, 0.75)
