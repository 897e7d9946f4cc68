"""Whole comparisons on a tiny model."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math

import jax
import numpy as np
import pytest

from kvjax.cache import methods
from kvjax.cache.model_cache import ModelCache
from kvjax.cache.plan import layer_bytes, resolve
from kvjax.errors import KvjaxError, NumericsError, UsageError
from kvjax.evaluation import accuracy, profile
from kvjax.evaluation import plan as plans
from kvjax.evaluation.batch import Batch
from kvjax.evaluation.compare import Comparison, compare
from kvjax.evaluation.plan import Options, Plan
from kvjax.evaluation.setting import Setting
from kvjax.evaluation.tally import Tally
from kvjax.evaluation.workload import WORKLOADS

METHODS = ("h2o", "int8")
NAMES = ("full", "random", "streaming_llm", *METHODS)
TASKS = ("kv", "perplexity-prefill")
OPTIONS = {"context": 128, "seeds": 2, "examples": 3, "batch": 2, "budget": "int8"}

FIELDS = {
    "method",
    "task",
    "context",
    "seed",
    "score",
    "perplexity",
    "bits_per_byte",
    "kl",
    "attention_error",
    "cache_bytes",
    "effective_bytes",
    "layer_bytes",
    "bytes_per_token",
    "bits_per_element",
    "ratio",
    "tokens_held",
    "prefill_ms",
    "prefill_ms_quartiles",
    "decode_ms_per_token",
    "decode_ms_quartiles",
    "examples",
    "batch",
    "budget",
    "query_aware",
    "note",
}


@pytest.fixture(scope="module")
def records(model):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(profile, "REPEATS", 2)
        return list(Plan.make(model, METHODS, TASKS, Options(**OPTIONS)).run())


def test_there_is_one_complete_record_per_method_task_and_seed(records):
    keys = [(r["method"], r["task"], r["seed"]) for r in records]
    assert sorted(keys) == sorted(itertools.product(NAMES, TASKS, range(2)))
    for record in records:
        assert set(record) == FIELDS
        assert json.loads(json.dumps(record, allow_nan=False)) == record


def test_scores_are_shares_and_perplexity_is_its_own_field(records):
    for record in records:
        assert record["examples"] == 3 and record["batch"] == 2 and record["context"] == 128
        if record["task"] == "kv":
            assert 0 <= record["score"] <= 1 and record["perplexity"] is None and record["bits_per_byte"] is None
        else:
            assert record["score"] is None and record["perplexity"] > 1 and record["bits_per_byte"] > 0
        assert record["prefill_ms"] > 0 and record["decode_ms_per_token"] > 0
        for name in ("prefill_ms", "decode_ms"):
            low, high = record[f"{name}_quartiles"]
            assert 0 < low <= high


def test_the_full_cache_is_the_reference(records):
    for record in records:
        if record["method"] == "full":
            assert record["kl"] == 0 and record["attention_error"] < 1e-6
            assert record["bits_per_element"] == 16 and record["tokens_held"] == 96
        elif record["method"] == "int8":
            assert record["kl"] > 0 and 1e-4 < record["attention_error"] < 0.05
            assert record["bits_per_element"] == 9 and record["tokens_held"] == 96
        else:
            assert record["kl"] > 0 and record["attention_error"] > 0.05
            assert record["bits_per_element"] == 16 and record["tokens_held"] < 90


def test_bytes_are_what_the_methods_declare(model, records):
    target = sum(layer_bytes(methods.int8(), dims) for dims in Setting(context=128, room=32, batch=1).dims(model))
    for record in records:
        assert record["cache_bytes"] == sum(record["layer_bytes"])
        assert len(record["layer_bytes"]) == model.config.num_layers
        assert record["bytes_per_token"] == pytest.approx(record["cache_bytes"] / 128, rel=1e-3)
        assert record["effective_bytes"] <= record["cache_bytes"]
        assert record["ratio"] == pytest.approx(record["bytes_per_token"] / (2 * 2 * 2 * 32 * 2), rel=1e-9)
        if record["method"] != "full":
            assert record["cache_bytes"] == pytest.approx(target, rel=0.02)


def test_a_stopped_run_goes_on_where_it_was(model, records):
    plan = Plan.make(model, METHODS, TASKS, Options(**OPTIONS))
    lost = [r for r in records if (r["method"], r["task"], r["seed"]) in {("int8", "kv", 1), ("full", "kv", 1)}]
    again = list(plan.run(done=[r for r in records if r not in lost]))
    fields = ("method", "task", "seed", "score", "kl", "attention_error", "layer_bytes", "tokens_held", "note")
    assert [[r[f] for f in fields] for r in again] == [[r[f] for f in fields] for r in lost]
    assert list(plan.run(done=records)) == []


def test_groups_of_methods_give_the_same_and_forget_each_others_programs(model, records, monkeypatch):
    forgotten: list[None] = []
    monkeypatch.setattr(plans, "GROUP", 2)
    monkeypatch.setattr(plans.jax, "clear_caches", lambda: forgotten.append(None))
    again = list(Plan.make(model, METHODS, TASKS, Options(**OPTIONS)).run())
    assert [r["method"] for r in again] == [n for group in (NAMES[:2], NAMES[2:4], NAMES[4:]) for n in group * 4]
    assert len(forgotten) == 2
    fields = ("method", "task", "seed", "score", "kl", "attention_error", "layer_bytes", "tokens_held", "note")
    ours, theirs = (sorted([repr(r[f]) for f in fields] for r in found) for found in (again, records))
    assert ours == theirs


def test_the_same_seeds_give_the_same_numbers(model, records):
    again = list(Plan.make(model, ["h2o"], ["perplexity-prefill"], Options(**{**OPTIONS, "seeds": 1})).run())
    old, other = (
        {r["method"]: r for r in records if r["task"] == "perplexity-prefill" and r["seed"] == seed} for seed in (0, 1)
    )
    assert len(again) == 4
    for record in again:
        for field in ("perplexity", "bits_per_byte", "kl", "attention_error", "cache_bytes", "effective_bytes"):
            assert record[field] == old[record["method"]][field]
    assert all(other[name]["perplexity"] != old[name]["perplexity"] for name in NAMES)


def test_perplexity_and_bits_per_byte_are_those_of_the_uncached_model(model, source):
    """The full cache in float32 against the plain forward pass over the same windows."""
    setting = Setting(context=128, room=32, batch=2, dtype="float32")
    items, tally = WORKLOADS["perplexity-prefill"].items(source, setting, 2, seed=0), Tally()
    full = methods.full()
    assert list(accuracy.run(Batch(model, setting, items), full, {"full": full}, {"full": tally}, False)) == ["full"]
    results = tally.results(scored=False)
    tokens = np.stack([np.concatenate([item.prompt, item.follow]) for item in items])
    log_p = np.asarray(jax.nn.log_softmax(model.apply(tokens)[0]), np.float64)
    picked = np.take_along_axis(log_p[:, -setting.room - 1 : -1], tokens[:, -setting.room :, None], axis=-1)
    assert results["perplexity"] == pytest.approx(math.exp(-picked.mean()), rel=1e-4)
    size = sum(item.text_bytes for item in items)
    assert results["bits_per_byte"] == pytest.approx(-picked.sum() / math.log(2) / size, rel=1e-4)


@pytest.mark.usefixtures("lone")
def test_streamed_text_runs_through_the_cache_and_says_what_cannot(model, records):
    made = list(
        Plan.make(model, ["snapkv:window=8", "int8"], ["perplexity-stream"], Options(**{**OPTIONS, "seeds": 1})).run()
    )
    stream = {r["method"]: r for r in made}
    prefill = {r["method"]: r for r in records if r["task"] == "perplexity-prefill" and r["seed"] == 0}
    assert stream["snapkv:window=8"]["perplexity"] is None and stream["snapkv:window=8"]["examples"] == 0
    assert "whole prompts" in stream["snapkv:window=8"]["note"]
    assert stream["int8"]["kl"] > 0 == stream["full"]["kl"]
    assert stream["int8"]["perplexity"] != prefill["int8"]["perplexity"]
    assert stream["int8"]["layer_bytes"] == prefill["int8"]["layer_bytes"]
    assert json.loads(json.dumps(made, allow_nan=False)) == made


@pytest.mark.parametrize(
    ("spec", "note"),
    [
        ("full", ""),
        ("int4", ""),
        ("h2o:tokens=40", ""),
        ("h2o:tokens=200", "no-op: nothing to compress"),
        ("kivi-2:residual=128", "no-op: nothing to compress"),
        ("random:tokens=200+int4", "evicts nothing"),
    ],
)
def test_what_compresses_nothing_is_labelled(model, source, setting, spec, note):
    batch = Batch(model, setting, WORKLOADS["kv"].items(source, setting, 2, seed=0))
    method = resolve(methods.parse(spec), setting.dims(model))
    assert profile.no_op(batch.start(method).cache, method) == note


@pytest.mark.parametrize("streamed", [False, True], ids=["prompt", "streamed"])
def test_heads_with_caches_of_their_own_are_counted_by_head(model, setting, source, streamed):
    """One of two heads keeps a window: that is not keeping everything, and a text streams through both."""
    method = methods.duo_attention(recent=16, sinks=4, table=((0, 1),))
    task = "perplexity-stream" if streamed else "kv"
    batch = Batch(model, setting, WORKLOADS[task].items(source, setting, 2, seed=0))
    cache = batch.start(method).cache
    if streamed:
        assert {layer.phase for layer in cache} == {"prompt"}
        return
    assert profile.no_op(cache, method) == ""
    held = [np.mean((np.asarray(s.positions) >= 0).sum(-1)) for part in cache[0].parts for s in part.segments]
    mean = profile.measure(batch, method, profile.time_pass(batch)).tokens_held
    assert mean == pytest.approx(sum(held) / 2)


@pytest.mark.usefixtures("lone")
def test_bytes_that_differ_from_the_plan_stop_the_run(model, monkeypatch):
    declared = ModelCache.planned_bytes.fget
    monkeypatch.setattr(ModelCache, "planned_bytes", property(lambda cache: [n + 1 for n in declared(cache)]))
    with pytest.raises(KvjaxError, match=r"'full' declares \d+ bytes for layer 0, but its live buffers hold \d+"):
        next(Plan.make(model, [], ["kv"], Options(**OPTIONS)).run())


@pytest.mark.parametrize(
    ("named", "tasks", "options", "message"),
    [
        (["int4"], ["nedle"], {}, "unknown task 'nedle'.*needle"),
        (["int44"], ["needle"], {}, "unknown method 'int44'.*int4"),
        (["int4"], ["needle"], {"context": 4096}, "4096 tokens is beyond the 256 positions of model 'tiny'"),
        (["int4"], ["needle"], {"context": 40}, "leaves no prompt"),
        (["int4"], [], {}, "no task"),
        (["int4:group=24"], ["needle"], {"context": 128}, "int4:group=24"),
        (["h2o"], ["needle"], {"budget": "many"}, "budget 'many'"),
        (["h2o"], ["needle"], {"seeds": 0}, "seeds must be at least 1"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_runs(model, monkeypatch, named, tasks, options, message):
    monkeypatch.setattr(Plan, "run", None)
    with pytest.raises(UsageError, match=message):
        compare(model, named, tasks, **options)


class Track:
    """A progress display that counts."""

    shown: list[Track] = []

    def __init__(self, label: str, total: int) -> None:
        self.total, self.done = total, 0
        self.shown.append(self)

    def __enter__(self):
        return self.advance

    def __exit__(self, *error: object) -> None:
        return

    def advance(self, steps: int = 1, note: str = "") -> None:
        self.done += steps


def test_compare_prints_its_table_and_writes_its_report(model, tmp_path):
    comparison = compare(model, METHODS, ["kv"], **OPTIONS, out=tmp_path / "new", progress=Track)
    assert isinstance(comparison, Comparison)
    text = str(comparison)
    assert all(name in text for name in (*NAMES, "kv"))
    assert "h2o" in (tmp_path / "new" / "report.html").read_text()
    assert [t.done for t in Track.shown] == [t.total for t in Track.shown] == [len(NAMES) * 2 * 2]


@pytest.mark.usefixtures("lone")
def test_progress_is_shown_unless_it_is_switched_off(model, capsys):
    options = {**OPTIONS, "seeds": 1}
    compare(model, [], ["kv"], **options)
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.splitlines()[-1].startswith("compare 2/2 ")
    compare(model, [], ["kv"], **options, progress=None)
    assert capsys.readouterr() == ("", "")


@pytest.mark.usefixtures("lone")
def test_what_is_no_number_stops_the_run_and_is_named(model):
    broken = dataclasses.replace(model, params=jax.tree.map(lambda leaf: leaf * np.nan, model.params))
    with pytest.raises(
        NumericsError, match=r"kl .*of method full, task kv, context 128, seed 0 came out as nan"
    ) as raised:
        compare(broken, [], ["kv"], **OPTIONS, progress=None)
    assert raised.value.exit_code not in {kind.exit_code for kind in (KvjaxError, UsageError)}


@pytest.mark.usefixtures("lone")
def test_a_folder_that_cannot_be_made_is_refused_before_anything_runs(model, tmp_path, monkeypatch):
    monkeypatch.setattr(Plan, "run", None)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot write"):
        compare(model, [], ["kv"], **OPTIONS, out=tmp_path / "file" / "report")


def test_query_aware_prompts_end_with_the_question(model, records):
    options = {**OPTIONS, "seeds": 1, "query_aware": True}
    shown = {r["method"]: r for r in Plan.make(model, METHODS, ["kv"], Options(**options)).run()}
    for hidden in (r for r in records if r["task"] == "kv" and r["seed"] == 0):
        seen = shown[hidden["method"]]
        assert (hidden["query_aware"], seen["query_aware"]) == (False, True)
        assert hidden["cache_bytes"] == seen["cache_bytes"]
        if hidden["method"] != "full":  # one token answers: it too is read from the compressed cache
            assert hidden["kl"] != seen["kl"] > 0


def test_a_budget_in_bytes_is_resolved_to_tokens_before_anything_is_compiled(model):
    plan = Plan.make(model, ["h2o"], ["needle"], Options(**{**OPTIONS, "budget": "30KiB"}))
    ((setting, fitted),) = plan.fitted.items()
    assert sum(layer_bytes(fitted["h2o"], dims) for dims in setting.dims(model)) <= 2 * 30 * 1024
    assert fitted["h2o"].budget.tokens_kept > 20
