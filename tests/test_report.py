"""Aggregation, intervals, page and table: from records to what a reader sees."""

from __future__ import annotations

import html.parser
import io
import itertools
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from kvjax.evaluation import plot, report
from kvjax.evaluation.figure import byte_size, number, percent
from kvjax.evaluation.summary import Estimate, Point, average, frontier, points, summarise, wilson
from kvjax.evaluation.table import tables
from tests.evaluation.records import ACCURACY, TASKS, record, sweep


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_the_published_intervals(successes, trials, low, high):
    """Newcombe (1998), table I, method 3."""
    estimate = wilson(successes, trials)
    assert (round(estimate.low, 4), round(estimate.high, 4)) == (low, high)
    assert estimate.mean == successes / trials


@pytest.mark.parametrize("truth", [[0.98, 0.95, 0.9, 0.99], [0.5, 0.2, 0.7, 0.4], [0.05, 0.02, 0.1, 0.0]])
def test_the_interval_of_a_mean_over_tasks_covers_the_truth(truth):
    random = np.random.default_rng(7)
    draws = random.binomial(150, truth, size=(2000, len(truth)))
    estimates = [average([wilson(successes, 150) for successes in draw]) for draw in draws]
    covered = np.mean([e.low <= np.mean(truth) <= e.high for e in estimates])
    assert covered >= 0.93


def test_examples_of_all_seeds_are_pooled():
    rows = summarise([record("int4", seed=0, score=1.0, examples=10), record("int4", seed=1, score=0.5, examples=30)])
    assert rows[0].scores["kv"] == wilson(25, 40)
    assert rows[0].score == average([wilson(25, 40)])
    assert (rows[0].questions, rows[0].texts, rows[0].seeds) == (40, 0, 2)


def test_questions_and_texts_are_counted_apart():
    text = [record("int4", "perplexity", seed, score=None, perplexity=9.5, examples=7) for seed in range(2)]
    unable = record("int4", "perplexity-stream", score=None, examples=0)
    rows = summarise([*sweep(["int4"]), *text, unable])
    assert (rows[0].questions, rows[0].texts) == (900, 14)
    assert "900 questions and 14 texts per method" in tables(rows)[0]
    assert "14 texts per method" in tables(summarise(text))[0] and "question" not in tables(summarise(text))[0]


def test_a_later_record_of_the_same_cell_replaces_the_earlier():
    rows = summarise([record("int4", score=0.0), record("int4", score=1.0)])
    assert rows[0].scores["kv"] == wilson(100, 100)


def test_a_method_that_lacks_a_task_has_no_mean():
    rows = {row.method: row for row in summarise([*sweep(["full", "int4"]), record("snapkv", "needle")])}
    assert rows["full"].score is not None
    assert rows["snapkv"].score is None
    assert rows["snapkv"].scores["needle"].mean == ACCURACY["snapkv"]


def test_contexts_are_separate_and_ascend():
    rows = summarise([*sweep(["int4"], context=2048), *sweep(["full"], context=512)])
    assert [(row.context, row.method) for row in rows] == [(512, "full"), (2048, "int4")]
    assert all(row.score is not None for row in rows)


def test_costs_are_means_and_times_are_medians():
    times = [1.0, 2.0, 30.0]
    rows = summarise([record("int4", seed=s, prefill_ms=t, kl=t) for s, t in enumerate(times)])
    assert rows[0].prefill_ms == 2.0
    assert rows[0].kl == pytest.approx(11.0)
    assert rows[0].layer_bytes == (record("int4")["layer_bytes"][0],) * 4


def _points(values: list[tuple[int, float]]) -> list[Point]:
    records = [record(f"m{i}", cache_bytes=size, score=score) for i, (size, score) in enumerate(values)]
    return points(summarise(records))


@given(st.lists(st.tuples(st.integers(1, 9), st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0])), min_size=1, max_size=9))
def test_the_frontier_is_what_nothing_beats(values):
    """Sizes here are equal or differ by far more than counts as equally large."""
    candidates = _points(values)

    def cost(point: Point) -> tuple[float, float]:
        return point.row.cache_bytes, -point.score.mean

    def beaten(point: Point) -> bool:
        return any(cost(q) != cost(point) and np.all(np.less_equal(cost(q), cost(point))) for q in candidates)

    found = [cost(point) for point in frontier(candidates)]
    assert found == sorted(cost(point) for point in candidates if not beaten(point))


def test_a_worse_method_is_not_on_the_frontier_for_a_hair_less_memory():
    best, *rest = reversed(frontier(_points([(1000, 0.9), (990, 0.3), (970, 0.2)])))
    assert (best.row.cache_bytes, best.score.mean) == (1000, 0.9)
    assert [point.row.cache_bytes for point in rest] == [970]


class Page(html.parser.HTMLParser):
    """Collects tags, references and text, and checks that tags nest."""

    VOID = frozenset({"meta", "link", "br", "wbr"})

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.references: list[str] = []
        self.names: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.references += [v for k, v in attrs if k in ("src", "href", "srcset", "action", "data") and v]
        self.names += [v for k, v in attrs if k == "id" and v]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


RUN = {
    "command": "kvjax demo",
    "start": "2026-01-01T00:00:00+00:00",
    "devices": [{"platform": "cpu", "kind": "cpu", "count": 1}],
    "versions": {"jax": "0.10.2"},
    "git": {"commit": "abc", "dirty": True},
}


def page(records, config=None, run=RUN) -> tuple[str, Page]:
    source = report.html(summarise(records), config=config or {"model": "reference"}, run=run)
    return source, Page(source)


def test_the_page_is_self_contained():
    source, parsed = page(sweep())
    inside = {f"#{name}" for name in parsed.names}
    assert set(parsed.references) - inside == {"data:,"}
    assert len(parsed.names) == len(set(parsed.names))
    assert "script" not in parsed.tags
    assert not re.search(r"url\(|@import|https?://", source)


def test_the_page_shows_every_number_and_how_it_was_made():
    _, parsed = page(sweep())
    for expected in (
        *ACCURACY,
        *TASKS,
        "1.1 MiB",
        "kvjax demo",
        "1 x cpu (cpu)",
        "jax 0.10.2",
        "with uncommitted changes",
    ):
        assert expected in parsed.text.replace("\u00a0", " ")
    assert "900 questions per method, 3 seeds" in " ".join(parsed.text.split())
    assert parsed.tags.count("svg") == 2
    assert parsed.tags.count("tr") == 1 + len(ACCURACY)


def test_the_page_has_a_light_and_a_dark_theme_and_fits_a_phone():
    source, _ = page(sweep())
    assert "prefers-color-scheme: dark" in source
    assert 'name="viewport" content="width=device-width' in source


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_has_enough_contrast(theme):
    """WCAG 2.2, AA: 4.5 to 1 for text; 3 to 1 for marks."""
    light, dark = plot.style_sheet().split("@media", 1)
    colours = dict(re.findall(r"--(\w+): (#\w{6})", light if theme == "light" else dark))

    def luminance(colour: str) -> float:
        channels = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    def contrast(first: str, second: str) -> float:
        low, high = sorted(luminance(colours[name]) for name in (first, second))
        return (high + 0.05) / (low + 0.05)

    for ink, paper in itertools.product(("ink", "soft", "warn"), ("paper", "panel")):
        assert contrast(ink, paper) >= 4.5, (ink, paper)
    assert min(contrast(mark, "paper") for mark in ("accent", "muted")) >= 3


def test_everything_from_outside_is_escaped():
    evil = '<script>alert("1")</script>'
    records = [record(evil, "needle & co", note=evil), record("full", "needle & co")]
    source, parsed = page(records, config={"model": evil, "x": evil}, run=RUN | {"command": evil, "system": evil})
    assert "<script" not in source
    assert parsed.text.count(evil) >= 5


def test_a_no_op_is_labelled():
    source, parsed = page([record("full"), record("snapkv", note="no-op")])
    assert '<span class="note">no-op</span>' in source
    assert "no-op" in parsed.text


def test_the_page_says_whether_the_question_was_hidden():
    assert "query-agnostic" in page(sweep(), {"query_aware": False})[1].text
    assert "query-aware" in page(sweep(), {"query_aware": True})[1].text


def test_perplexity_alone_makes_a_page_without_a_plot():
    records = [record(m, "perplexity", score=None, examples=16, perplexity=6.125) for m in ("full", "int4")]
    _, parsed = page(records)
    assert "svg" not in parsed.tags
    assert "6.125" in parsed.text
    assert "What the memory buys" not in parsed.text


def test_write_leaves_a_page_and_a_plot(tmp_path):
    path = report.write(tmp_path, sweep(), config={}, run={})
    assert path == tmp_path / "report.html"
    Page(path.read_text(encoding="utf-8"))
    ElementTree.parse(tmp_path / "pareto.svg")


@pytest.mark.parametrize("tasks", [TASKS, ("needle", "multikey", "multivalue", "multiquery", "kv", "vt", "copy")])
def test_the_terminal_table_fits_100_columns(tasks):
    records = sweep([*ACCURACY, "snapkv:tokens=256,window=32+int4"], tasks)
    records += [record(m, "perplexity", score=None, examples=16, perplexity=12.34) for m in ACCURACY]
    console = Console(width=100, record=True, file=io.StringIO())
    for table in tables(summarise(records)):
        console.print(table)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 100
    assert "…" not in text
    assert text.count("95 ±") >= len(tasks)
    assert all(task in text for task in (*tasks, "ppl"))


def test_numbers_are_short():
    assert [percent(x) for x in (0.0, 0.0042, 0.25, 1.03)] == ["0 %", "0.4 %", "25 %", "103 %"]
    assert [byte_size(x) for x in (512, 1536, 163_840, 5 << 20, 3 << 33)] == [
        "512 B",
        "1.5 KiB",
        "160 KiB",
        "5 MiB",
        "24 GiB",
    ]
    assert [number(x) for x in (None, 0.0, 0.012345, 3.14159, 1234.5)] == ["–", "0", "0.0123", "3.14", "1234"]


def test_disjoint_means_no_common_point():
    low, high = Estimate(0.4, 0.3, 0.5), Estimate(0.7, 0.6, 0.8)
    assert low.disjoint(high) and high.disjoint(low)
    assert not low.disjoint(Estimate(0.55, 0.5, 0.6))
