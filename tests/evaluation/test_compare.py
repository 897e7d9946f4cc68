"""Whole comparisons on a tiny model."""

from __future__ import annotations

import itertools
import json
import math

import pytest

import kvjax.evaluation.profile
from kvjax.cache import methods
from kvjax.cache.model_cache import ModelCache
from kvjax.cache.plan import layer_bytes, resolve
from kvjax.errors import KvjaxError, UsageError
from kvjax.evaluation.compare import Comparison, compare
from kvjax.evaluation.plan import Options, Plan
from kvjax.evaluation.setting import Setting

METHODS = ("h2o", "snapkv:window=8", "int2")
TASKS = ("kv", "perplexity-prefill")
OPTIONS = Options(context=128, seeds=2, examples=3, batch=2, budget="int8")

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


@pytest.fixture(scope="module", autouse=True)
def few_repeats():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kvjax.evaluation.profile, "REPEATS", 2)
        yield


@pytest.fixture(scope="module")
def records(model):
    return list(Plan.make(model, METHODS, TASKS, OPTIONS).run())


def test_there_is_one_complete_record_per_method_task_and_seed(records):
    keys = [(r["method"], r["task"], r["seed"]) for r in records]
    names = ("full", "random", "streaming_llm", *METHODS)
    assert sorted(keys) == sorted(itertools.product(names, TASKS, range(2)))
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
        assert record["kl"] >= -1e-6 and record["attention_error"] >= 0
        assert record["prefill_ms"] > 0 and record["decode_ms_per_token"] > 0
        for name in ("prefill_ms", "decode_ms"):
            assert len(record[f"{name}_quartiles"]) == 2


def test_the_full_cache_is_the_reference(records):
    for record in records:
        if record["method"] == "full":
            assert record["kl"] == 0 and record["attention_error"] < 1e-6
            assert record["bits_per_element"] == 16 and record["tokens_held"] == 96
        else:
            assert record["kl"] > 0 and record["attention_error"] > 0.01


def test_bytes_are_what_the_methods_declare(model, records):
    setting = Setting(context=128, room=32, batch=2)
    one_row = Setting(context=128, room=32, batch=1)
    by_name = {r["method"]: r for r in records}
    wanted = layer_bytes(methods.parse("int8"), one_row.dims(model)[0])
    for name, record in by_name.items():
        assert record["cache_bytes"] == sum(record["layer_bytes"])
        assert len(record["layer_bytes"]) == model.config.num_layers
        assert record["bytes_per_token"] == pytest.approx(record["cache_bytes"] / 128, rel=1e-3)
        assert record["effective_bytes"] <= record["cache_bytes"]
        assert record["ratio"] == pytest.approx(record["bytes_per_token"] / (2 * 2 * 2 * 32 * 2), rel=1e-9)
        if name not in ("full", "int2"):
            share = record["cache_bytes"] / (model.config.num_layers * wanted)
            assert share <= 1.01 and (share >= 0.98 or "of the budget's bytes" in record["note"])
    plan = [layer_bytes(methods.parse("int2"), layer) / 2 for layer in setting.dims(model)]
    assert by_name["int2"]["layer_bytes"] == [round(size) for size in plan]


def test_a_stopped_run_goes_on_where_it_was(model, records):
    plan = Plan.make(model, METHODS, TASKS, OPTIONS)
    lost = [r for r in records if (r["method"], r["task"], r["seed"]) in {("int2", "kv", 1), ("full", "kv", 1)}]
    again = list(plan.run(done=[r for r in records if r not in lost]))
    fields = ("method", "task", "seed", "score", "kl", "attention_error", "layer_bytes", "tokens_held", "note")
    assert [[r[f] for f in fields] for r in again] == [[r[f] for f in fields] for r in lost]
    assert list(plan.run(done=records)) == []


def test_the_same_seeds_give_the_same_numbers(model, records):
    options = Options(context=128, seeds=1, examples=3, batch=2, budget="int8")
    again = list(Plan.make(model, ["snapkv:window=8"], ["perplexity-prefill"], options).run())
    old = {r["method"]: r for r in records if r["task"] == "perplexity-prefill" and r["seed"] == 0}
    for record in again:
        for field in ("perplexity", "bits_per_byte", "kl", "attention_error", "cache_bytes", "effective_bytes"):
            assert record[field] == old[record["method"]][field]
    other = {r["method"]: r for r in records if r["task"] == "perplexity-prefill" and r["seed"] == 1}
    assert all(other[name]["perplexity"] != old[name]["perplexity"] for name in old)


def test_perplexity_and_bits_per_byte_are_those_of_the_uncached_model(model):
    """The full cache in float32 against the plain forward pass over the same windows."""
    import jax
    import numpy as np

    from kvjax.evaluation.workload import WORKLOADS

    options = Options(context=128, seeds=1, examples=2, batch=2, dtype="float32")
    plan = Plan.make(model, [], ["perplexity-prefill"], options)
    record = next(r for r in plan.run() if r["method"] == "full")
    items = WORKLOADS["perplexity-prefill"].items(plan.source, next(iter(plan.fitted)), 2, seed=0)
    tokens = np.stack([np.concatenate([item.prompt, item.follow]) for item in items])
    log_p = np.asarray(jax.nn.log_softmax(model.apply(tokens)[0]), np.float64)
    graded = items[0].graded
    picked = np.take_along_axis(log_p[:, -graded - 1 : -1], tokens[:, -graded:, None], axis=-1)
    assert record["perplexity"] == pytest.approx(math.exp(-picked.mean()), rel=1e-4)
    size = sum(item.text_bytes for item in items)
    assert record["bits_per_byte"] == pytest.approx(-picked.sum() / math.log(2) / size, rel=1e-4)


def test_streamed_text_runs_through_the_cache_and_says_what_cannot(model):
    options = Options(context=96, seeds=1, examples=1, batch=1, budget="50%", dtype="float32")
    made = list(Plan.make(model, ["snapkv:window=8", "int2"], ["perplexity"], options).run())
    stream = {r["method"]: r for r in made if r["task"] == "perplexity-stream"}
    prefill = {r["method"]: r for r in made if r["task"] == "perplexity-prefill"}
    assert stream["snapkv:window=8"]["perplexity"] is None
    assert "whole prompt" in stream["snapkv:window=8"]["note"] and prefill["snapkv:window=8"]["note"] == ""
    for name in ("random", "streaming_llm", "int2"):
        assert stream[name]["kl"] > 0 and stream[name]["perplexity"] != prefill[name]["perplexity"]
        assert stream[name]["layer_bytes"] == prefill[name]["layer_bytes"]


def test_a_prompt_that_fits_the_budget_is_labelled_a_no_op(model):
    options = Options(context=128, seeds=1, examples=1, batch=1, budget="200")
    made = Plan.make(model, ["kivi-2:residual=128", "snapkv:window=8+int4", "int4"], ["needle"], options).run()
    notes = {r["method"]: r["note"] for r in made}
    assert notes == {
        "full": "",
        "random": "no-op: nothing to compress",
        "streaming_llm": "no-op: nothing to compress",
        "kivi-2:residual=128": "no-op: nothing to compress",
        "snapkv:window=8+int4": "evicts nothing",
        "int4": "",
    }


def test_bytes_that_differ_from_the_plan_stop_the_run(model, monkeypatch):
    declared = ModelCache.planned_bytes.fget
    monkeypatch.setattr(ModelCache, "planned_bytes", property(lambda cache: [n + 1 for n in declared(cache)]))
    options = Options(context=128, seeds=1, examples=1, batch=1)
    with pytest.raises(KvjaxError, match=r"'full' declares \d+ bytes for layer 0, but its live buffers hold \d+"):
        next(Plan.make(model, [], ["needle"], options).run())


@pytest.mark.parametrize(
    ("methods_", "tasks", "options", "message"),
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
def test_what_cannot_run_is_refused_before_anything_runs(model, monkeypatch, methods_, tasks, options, message):
    monkeypatch.setattr(Plan, "run", None)
    with pytest.raises(UsageError, match=message):
        compare(model, methods_, tasks, **options)


def test_compare_prints_its_table_and_writes_its_report(model, tmp_path):
    labels = []

    class Track:
        def __init__(self, label, total):
            self.label, self.total, self.done = label, total, 0
            labels.append(self)

        def __enter__(self):
            return self.advance

        def __exit__(self, *error):
            return None

        def advance(self, steps=1, note=""):
            self.done += steps

    comparison = compare(
        model, ["int4"], ["needle"], context=96, seeds=2, examples=2, batch=2, out=tmp_path / "new", progress=Track
    )
    assert isinstance(comparison, Comparison)
    text = str(comparison)
    for name in ("full", "random", "streaming_llm", "int4", "needle"):
        assert name in text
    assert "int4" in (tmp_path / "new" / "report.html").read_text()
    assert [t.done for t in labels] == [t.total for t in labels] == [8]


def test_query_aware_prompts_end_with_the_question(model):
    options = {"context": 128, "seeds": 1, "examples": 2, "batch": 2, "budget": "20%"}
    runs = [
        compare(model, ["snapkv:window=8"], ["multiquery"], query_aware=aware, **options) for aware in (False, True)
    ]
    kept = [{r["method"]: r for r in run.records} for run in runs]
    for hidden, shown in zip(kept[0].values(), kept[1].values(), strict=True):
        assert (hidden["query_aware"], shown["query_aware"]) == (False, True)
        assert hidden["cache_bytes"] == shown["cache_bytes"]
    assert kept[0]["snapkv:window=8"]["kl"] != kept[1]["snapkv:window=8"]["kl"]


def test_fitted_methods_are_what_resolve_gives(model):
    plan = Plan.make(model, ["h2o"], ["needle"], Options(context=128, examples=1, budget="20KiB"))
    ((setting, fitted),) = plan.fitted.items()
    assert fitted["h2o"] == resolve(fitted["h2o"], setting.dims(model))
    assert fitted["h2o"].budget.tokens_kept > 0
