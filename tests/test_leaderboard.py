"""The leaderboard: what a broken method costs the others, what the pages say, and that a run goes on."""

from __future__ import annotations

import dataclasses
import html.parser
import json
import re
from types import SimpleNamespace
from typing import Any

import pytest

import kvjax
from experiments import leaderboard
from experiments.board import board as boards
from experiments.board import cells, markdown, measure, page
from experiments.board.cells import Cell
from kvjax.cache import methods
from kvjax.cache.layer_cache import LayerData
from kvjax.engine.calibrated import Calibrated, weights_digest
from kvjax.errors import UsageError
from kvjax.evaluation.defaults import REFERENCE as FULL
from kvjax.evaluation.summary import summarise
from kvjax.models.language_model import LanguageModel
from tests.evaluation.records import record
from tests.evaluation.tiny import tiny


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return tiny()


def test_methods_that_must_be_calibrated_are_named_until_there_is_a_file(model, tmp_path):
    chosen, missing = cells.entrants((), None, model)
    assert {"razor", "duo_attention", "simlayerkv", "prefixkv", "kvzap", "kvquant-3", "cskv"} <= set(missing)
    assert {one.name for one in chosen} | set(missing) | {FULL, "selective"} == set(methods.METHODS)

    method = dataclasses.replace(methods.parse("duo_attention:recent=16,sinks=4"), name="duo_attention")
    Calibrated(method, (LayerData(), LayerData()), weights_digest(model)).save(tmp_path / "duo_attention.safetensors")
    chosen, still = cells.entrants(("h2o", "duo_attention"), tmp_path, model)
    assert [one.name for one in chosen] == ["h2o", "duo_attention"] and still == []
    Calibrated(method, (LayerData(), LayerData()), "other").save(tmp_path / "other.safetensors")
    with pytest.raises(UsageError, match="other weights"):
        cells.entrants(("h2o",), tmp_path, model)
    with pytest.raises(UsageError, match="no folder"):
        cells.entrants((), tmp_path / "none", model)


@dataclasses.dataclass(frozen=True)
class FakePlan:
    """Measures two tasks; methods of `broken` stop it in the second one."""

    contenders: tuple[SimpleNamespace, ...]
    fitted: dict[str, dict[str, None]]
    broken: frozenset[str]
    asked: list[tuple[str, ...]] = dataclasses.field(default_factory=list)

    def run(self, done, track):
        names = tuple(self.fitted["setting"])
        self.asked.append(names)
        finished = {(r["method"], r["task"]) for r in done}
        for task in ("first", "second"):
            left = [name for name in names if (name, task) not in finished]
            if task == "second" and self.broken & set(left):
                raise ZeroDivisionError("it broke")
            yield from ({"method": name, "task": task} for name in left)


class FakeRun:
    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []

    def append(self, record: dict[str, Any]) -> None:
        self.records.append(record)


def fake_plan(*names: str, broken: str = "") -> FakePlan:
    everyone = (FULL, *names)
    contenders = tuple(SimpleNamespace(name=name) for name in everyone)
    return FakePlan(contenders, {"setting": dict.fromkeys(everyone)}, frozenset(broken.split()))


def test_without_errors_all_methods_share_one_run():
    plan, run = fake_plan("a", "b", "c"), FakeRun()
    assert measure.measure(plan, ("a", "c"), run, None) == {}
    assert plan.asked == [(FULL, "a", "c")]


def test_what_breaks_takes_nothing_with_it():
    plan, run = fake_plan(*"abcdefg", broken="c f"), FakeRun()
    failures = measure.measure(plan, tuple("abcdefg"), run, None)
    assert failures == dict.fromkeys("cf", "ZeroDivisionError: it broke")
    measured = [(r["method"], r["task"]) for r in run.records]
    assert len(set(measured)) == len(measured), "nothing is measured twice"
    assert {m for m, task in measured if task == "second"} == {FULL, *"abdeg"}


def test_a_broken_reference_stops_the_board():
    with pytest.raises(ZeroDivisionError):
        measure.measure(fake_plan("a", "b", broken=FULL), ("a", "b"), FakeRun(), None)


SCORES = {"full": 1.0, "snapkv:bytes=9": 0.5, "int4": 0.98, "int2": 0.3, "broken": 0.9, "<b>&": 0.1}
SHARES = {"full": 1.02, "snapkv:bytes=9": 0.25, "int4": 0.3, "int2": 0.2, "broken": 0.25, "<b>&": 0.125}


@pytest.fixture
def board() -> boards.Board:
    sizes = {name: {"ratio": share, "cache_bytes": round(1e6 * share)} for name, share in SHARES.items()}
    tasks = ("needle", "kv")
    records = [record(n, task, score=score, **sizes[n]) for n, score in SCORES.items() for task in tasks]
    records += [record(n, "perplexity-prefill", score=None, perplexity=20.5, **sizes[n]) for n in SCORES]
    contender = methods.parse("int4")
    made = [
        Cell("snapkv", "evicts", 0.25, "snapkv:bytes=9", 0.25, contender),
        Cell("snapkv", "evicts", 0.125, reason="too small"),
        Cell("int4", "fewer bits", 0.25, "int4", 0.3, contender),
        Cell("int2", "fewer bits", None, "int2", 0.2, contender),
        Cell("broken", "evicts", 0.25, "broken", 0.25, contender),
        Cell("<b>&", "both", 0.125, "<b>&", 0.125, contender),
    ]
    config = {"model": "tiny", "tasks": ["needle"], "seeds": 1, "query_aware": False, "batch": 4, "dtype": "bfloat16"}
    config |= {"command": "kvjax leaderboard", "quick": False}
    info = {"start": "2026-01-02T03:04:05+00:00", "system": "Linux", "cpu_count": 2, "versions": {"jax": "1"}}
    return boards.Board(made, summarise(records), {"broken": "E: <i>"}, ["razor"], (0.25, 0.125), config, info)


def test_the_best_of_a_size_is_one_that_fits_it(board):
    assert board.best(0.25) == "snapkv:bytes=9", "int4 takes more than 1/4, and what broke does not count"
    assert board.best(0.5) is None


def test_fronts_hold_what_nothing_of_their_kind_beats(board):
    assert [p.row.method for p in board.front("fewer bits")] == ["int2", "int4"]
    assert [p.row.method for p in board.front()] == ["<b>&", "int2", "snapkv:bytes=9", "int4", "full"]


def test_the_text_has_a_row_per_method_and_keeps_what_failed_apart(board):
    text = markdown.markdown(board)
    table = text.split("## Score")[1].split("## Distance")[0]
    rows = {
        line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]]
        for line in table.splitlines()
        if "|" in line
    }
    assert rows["method"] == ["kind", "1/4", "1/8", "other"]
    assert rows["snapkv"] == ["evicts", "**50 ±7**", "–", ""]
    assert rows["int4"] == ["fewer bits", "98 ±4 (30 %)", "", ""]
    assert rows["int2"] == ["fewer bits", "", "", "30 ±7 (20 %)"]
    assert rows["broken"] == ["evicts", "failed", "", ""]
    assert "- `broken`: E: <i>" in text and "razor must be calibrated" in text
    assert "- snapkv at 1/8: too small" in text and "2026-01-02" in text and "quick" not in text
    assert all(
        line.count("|") == table.splitlines()[-3].count("|") for line in table.splitlines() if line.startswith("|")
    )


def test_a_quick_board_says_so(board):
    quick = dataclasses.replace(board, config={**board.config, "quick": True})
    assert markdown.markdown(quick).startswith("# Leaderboard (quick)") and "**A quick board**" in markdown.markdown(
        quick
    )
    assert "A quick board" in page.html(quick) and "A quick board" not in page.html(board)
    measured = dataclasses.replace(board, rows=[dataclasses.replace(row, attention_error=0.25) for row in board.rows])
    assert "attention error" in page.html(measured) and "attention error" not in page.html(board)


class Cells(html.parser.HTMLParser):
    """The cells of the table: per row the sort keys."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str | None]] = []
        self.void = {"meta", "link", "input", "br"}
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.void:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append(dict(attrs).get("data-key"))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_escaped_and_asks_nobody(board):
    source = page.html(board)
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org)|\bsrc=", source)
    assert source.count("<script>") == source.count("</script>") == 1 and "addEventListener" in source
    assert "&lt;b&gt;&amp;" in source and "<b>&</th>" not in source and "E: &lt;i&gt;" in source
    parsed = Cells()
    parsed.feed(source)
    assert parsed.open == []
    head, *rows = parsed.rows
    assert len(rows) == len(board.measured) and all(len(row) == len(head) for row in rows)
    names = {row[0]: row for row in rows}
    assert set(names) == {"full", "snapkv", "int4", "int2", "<b>&"}
    mean = 1 + page._columns(board).index("mean score")
    assert {name: float(row[mean] or "nan") for name, row in names.items()} == pytest.approx(
        {board.settings[s].name if s != "full" else s: SCORES[s] for s in board.measured}
    )


@pytest.mark.slow
def test_the_command_measures_once_and_goes_on(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(kvjax, "load", lambda name: model)
    monkeypatch.setattr("kvjax.evaluation.profile.REPEATS", 2)
    out = tmp_path / "run"
    config = leaderboard.Config(
        methods=("int4", "snapkv", "razor"),
        quick=True,
        sizes=(4,),
        tasks=("kv",),
        examples=2,
        context=128,
        batch=2,
        out=out,
    )
    assert leaderboard.main(config) == 0
    lines = (out / "results.jsonl").read_text().splitlines()
    assert {json.loads(line)["method"] for line in lines} == {"full", "int4"}, (
        "64 recent tokens are more than a quarter"
    )
    assert "razor must be calibrated" in capsys.readouterr().out
    monkeypatch.setattr(leaderboard, "FOLDER", tmp_path)
    assert leaderboard.main(dataclasses.replace(config, update=True)) == 0
    assert (out / "results.jsonl").read_text().splitlines() == lines, "nothing was measured again"
    for name in (leaderboard.TEXT, leaderboard.PAGE):
        assert (tmp_path / name).read_text() == (out / name).read_text() != ""


def test_the_command_line_is_shown_without_the_paths_of_one_machine(tmp_path):
    assert leaderboard.command(leaderboard.Config(out=tmp_path, update=True)) == "kvjax leaderboard"
    config = leaderboard.Config(model=str(tmp_path / "llama"), calibrations=tmp_path / "made", quick=True, sizes=(2, 8))
    assert leaderboard.command(config) == "kvjax leaderboard --model llama --calibrations made --quick --sizes 2 8"


def test_sizes_are_checked_before_anything_is_loaded():
    with pytest.raises(UsageError, match="--sizes"):
        leaderboard.main(leaderboard.Config(sizes=(0,)))
