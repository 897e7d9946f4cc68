"""The benchmark of methods: who has which goal, what ratios are of, and that a run leaves what it says."""

from __future__ import annotations

import functools
import io
import json
import math
from typing import Any

import jax
import numpy as np
import pytest

from experiments import bench_methods
from experiments.bench import method_cost, method_report, race
from experiments.bench.one_layer import Setting, rising_data
from kvjax.cache.methods import METHODS, parse
from kvjax.cache.plan import layer_bytes
from kvjax.errors import UsageError
from tests.thin import thinned

NAMES = ("h2o:share=50%,recent=8", "int8")
SMALL: dict[str, Any] = {
    "batch": 2,
    "context": 64,
    "heads": "4:2",
    "head_dim": 32,
    "width": 64,
    "mlp": 128,
    "layers": 2,
}
SETTING = Setting(2, 64, 4, 2, 32, 64, 128, 2, reserve=16)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(folder, config) of a tiny run."""
    out = tmp_path_factory.mktemp("bench") / "run"
    config = bench_methods.Config(methods=NAMES, **SMALL, prompts=2, rounds=3, out=out)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_methods, "forget_programs", lambda: None)
        patch.setattr(jax, "clear_caches", lambda: None)
        bench_methods.main(config)
    return out, config


@pytest.fixture(scope="module")
def record(run):
    (line,) = (run[0] / "results.jsonl").read_text().splitlines()
    return json.loads(line)


def test_everybody_is_measured_in_the_same_rounds(record):
    assert list(record["methods"]) == ["full", *NAMES]
    for one in record["methods"].values():
        assert [len(one["compress"][name]) for name in ("seconds", "processor_seconds")] == [2, 2]
        assert len(one["decode"]["seconds"]) == 3
        assert min(*one["compress"]["seconds"], *one["decode"]["seconds"]) > 0
        assert all(time > 0 for part in one["compile"] for time in part.values())
        assert 0 < one["largest"] <= one["temporaries"] + one["cache"]
    assert len(record["prefill"]["seconds"]) == len(record["attention"]["seconds"]) == 2
    assert record["left_out"] == {}


def test_bytes_are_those_of_the_caches(record):
    slots = 64 + method_cost.reserved(3)
    for name, one in record["methods"].items():
        dims = Setting(2, 64, 4, 2, 32, 64, 128, 2, reserve=method_cost.reserved(3)).dims
        assert one["cache"] == layer_bytes(parse(name), dims)
        assert one["dequantised"] == 4 * 2 * 2 * 32 * (32 if name.startswith("h2o") else slots)


def test_ratios_are_within_rounds_and_goals_are_judged_by_their_medians():
    def laps(*seconds):
        return {"seconds": list(seconds), "processor_seconds": [2 * x for x in seconds]}

    def method(compress, decode, seconds, largest, share, step):
        return {
            "compress": laps(*compress),
            "decode": laps(*decode),
            "compile": [{"seconds": x, "processor": 2 * x} for x in seconds],
            "largest": largest,
            "temporaries": largest,
            "dequantised": 100,
            "cache": 50,
            "every_query": False,
            "goals": {"share": share, "step": step},
        }

    record = {
        "setting": dict.fromkeys(
            ("layers", "batch", "context", "query_heads", "kv_heads", "head_dim", "width", "mlp"), 1
        ),
        "prefill": laps(10.0, 20.0, 40.0),
        "attention": laps(5.0, 5.0, 5.0),
        "compile_prefill": {"seconds": 2.0, "processor": 1.0},
        "methods": {
            "full": method((1.0, 1.0, 1.0), (1.0, 2.0, 4.0), (1.0, 1.0), 99, None, None),
            "good": method((1.0, 2.0, 4.0), (1.0, 2.0, 4.4), (4.0, 4.0), 100, 0.1, 1.0),
            "bad": method((1.1, 2.2, 4.4), (1.1, 2.2, 4.0), (4.2, 4.0), 101, 0.1, 1.0),
        },
        "left_out": {"kvzip": "why"},
    }
    full, good, bad = method_report.costs(record)
    assert good.share.value.median == pytest.approx(0.1) and good.of_attention == pytest.approx(0.4)
    assert good.steps.value.median == 1.0 and good.steps.value.high == pytest.approx(1.05)
    assert good.compiled.value.median == 2.5 and good.compiling == 10.0
    assert good.processor == (pytest.approx(0.1), 1.0, 17 / 5)
    assert [one.met for one in (good.share, good.steps, good.compiled, good.temporary)] == [True] * 4
    assert [one.met for one in (bad.share, bad.steps, bad.compiled, bad.temporary)] == [False] * 4
    assert [one.met for one in (full.share, full.steps, full.compiled, full.temporary)] == [None, None, True, True]
    notes = method_report.notes(record)
    assert notes[0] == "share of the prefill: 1 of 2 reach the goal; not bad"
    assert notes[2] == "compile time: 2 of 3 reach the goal; not bad"
    assert notes[-1] == "kvzip is left out: why."
    line = next(line for line in method_report.markdown(record).splitlines() if line.startswith("| bad"))
    assert "11.0 % ✗" in line and "1.10 (1.05–1.10) ✗" in line and "2.55 ✗" in line and "101.0 % ✗" in line


@pytest.mark.parametrize(
    ("name", "share", "step"),
    [
        ("full", None, None),
        ("snapkv", 0.1, 1.0),
        ("keydiff", 0.1, 1.0),
        ("streaming_llm", 0.1, 1.0),
        ("tova", 0.1, 1.0),
        ("h2o", 0.6, 1.0),
        ("keyformer", 0.6, 1.0),
        ("keyformer_released", 0.6, 1.0),
        ("prefixkv", 0.6, 1.0),
        ("criticalkv", 0.1, 1.0),
        ("mikv", 0.6, None),
        ("int8", None, 1.0),
        ("int4", None, 1.1),
        ("kivi-4", None, None),
        ("int2", None, None),
        ("quest", None, None),
        ("h2o+int4", 0.6, 1.1),
    ],
)
def test_goals(name, share, step):
    assert (method_cost.share_goal(parse(name)), method_cost.step_goal(parse(name))) == (share, step)


@functools.cache
def abstract(setting):
    """Weights and recorded prompt, shapes only."""
    params, rows = jax.eval_shape(setting.weights), jax.eval_shape(setting.rows)
    return params, jax.eval_shape(setting.record, params, rows)


@pytest.mark.parametrize("name", thinned(METHODS, 3))
def test_every_named_method_can_be_measured(name):
    """At the sizes of the goals, as shapes: nothing is computed."""
    config = bench_methods.Config()
    setting = Setting(4, 4096, 32, 8, 128, config.width, config.mlp, config.layers, reserve=64)
    method = parse(name)
    if method.repetition is not None or method.policy.needs_hiding:
        return
    params, recorded = abstract(setting)
    data = jax.eval_shape(lambda: rising_data(method, setting.dims))
    cache = jax.eval_shape(lambda r, d: setting.compress(method, r, d), recorded, data)
    output, after = jax.eval_shape(setting.decode, cache, jax.eval_shape(setting.token, params))
    assert output.shape == (4, 1, 32, 128)
    assert jax.tree.structure(after) == jax.tree.structure(cache)


def test_the_layer_is_that_of_the_model():
    """What attention is handed by the layer gives the layer's output back, and a cache decodes the next token."""
    params, rows = SETTING.weights(), SETTING.rows()
    output, recorded = jax.jit(SETTING.prompt)(params, rows)
    assert output.shape == (2, 64, 64) and recorded.log_sum_exp.shape == (2, 2, 2, 64)
    attended, log_sum_exp = jax.jit(SETTING.attention)(recorded)
    np.testing.assert_allclose(log_sum_exp, recorded.log_sum_exp, rtol=1e-5)
    assert attended.shape == (2, 64, 4, 32)
    full = parse("full")
    cache = jax.jit(lambda x: SETTING.compress(full, x, rising_data(full, SETTING.dims)))(recorded)
    decoded, after = jax.jit(SETTING.decode)(cache, jax.jit(SETTING.token)(params))
    assert decoded.shape == (2, 1, 4, 32) and np.isfinite(np.asarray(decoded)).all()
    assert after.length.tolist() == [65, 65]


def test_a_run_leaves_its_results_and_a_finished_one_is_not_measured_again(run, record, monkeypatch):
    folder, config = run
    found = json.loads((folder / "methods.json").read_text())
    assert found["methods"] == record["methods"] and found["versions"]["jax"] == jax.__version__
    assert (folder / "methods.md").read_text() == method_report.markdown(record)
    monkeypatch.setattr(method_cost, "measure", pytest.fail)
    monkeypatch.setattr(bench_methods, "forget_programs", lambda: None)
    bench_methods.main(config)


def test_a_terminal_shows_every_method(record):
    from rich.console import Console

    console = Console(width=200, record=True, file=io.StringIO())
    method_report.show(console, record)
    text = console.export_text()
    for name, one in zip(record["methods"], method_report.costs(record), strict=True):
        line = next(line for line in text.splitlines() if line.strip().startswith(name))
        assert f"{one.steps.value.median:.2f}" in line and math.isfinite(one.share.value.median)


def test_what_cannot_be_measured():
    cases: list[tuple[dict[str, Any], str]] = [
        ({"methods": ("snapchat",)}, "--methods snapchat"),
        ({"methods": ("snapkv:tokens=8",), **SMALL}, "--methods snapkv:tokens=8"),
        ({"heads": "32:5"}, "queries:kv"),
        ({"rounds": 0}, "at least 1"),
    ]
    for options, reason in cases:
        with pytest.raises(UsageError, match=reason):
            bench_methods.main(bench_methods.Config(**options))


def test_warming_up_can_be_less():
    counts = []
    laps = race.race({"a": counts.append}, 2, warm_up=1)["a"]
    assert counts == [1, 1, 1] and laps.calls == 1
