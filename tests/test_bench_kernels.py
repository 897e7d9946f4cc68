"""The benchmark of the kernels: what is timed is checked, ratios are within rounds, and every record can be read."""

from __future__ import annotations

import io
import json
import os
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import bench_kernels
from experiments.bench import contest, decode, entrant, plan, race, report, summary
from kvjax.errors import NumericsError, UsageError
from pallas_kernels.cache_update.specs import UpdateSpec

GIB = 2**30


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run at tiny sizes of every op."""
    out = tmp_path_factory.mktemp("bench") / "run"
    config = bench_kernels.Config(
        batch=(2,), context=(64,), heads=("4:2",), head_dim=(32,), format=("bf16", "int8"), rounds=3, out=out
    )
    patch = pytest.MonkeyPatch()
    patch.setattr(plan, "HARDWARE", (UpdateSpec("token", 1, 2, 64, 32, bytes_per_slot=32),))
    with patch.context():
        bench_kernels.main(config)
    return out, config


@pytest.fixture(scope="module")
def records(folder):
    lines = (folder[0] / "results.jsonl").read_text().splitlines()
    return {record["op"]: record for record in map(json.loads, lines)}


def test_every_op_is_measured(records):
    assert set(records) == {"decode_attention", "prefill_attention", "attention_mass", "cache_update"}
    for record in records.values():
        for measured in record["entrants"].values():
            assert len(measured["seconds"]) == len(measured["processor_seconds"]) == 3
            assert min(measured["seconds"]) > 0
            assert measured["moves"] > 0


def test_decode_is_compared_with_others_and_naively(records):
    found = records["decode_attention"]["entrants"]
    own = {"kvjax bf16", "kvjax int8", "kvjax int8, positions", "kvjax int8, 2 devices", "naive int8"}
    assert own | {"xla f32", "xla bf16", "jax.nn f32", "read"} <= set(found)
    assert "jax paged int8" in records["decode_attention"]["left_out"]


def test_bytes_are_those_of_the_packed_arrays(records):
    found = records["decode_attention"]["entrants"]
    slots, queries = 2 * 2 * 64, 2 * 2 * 2
    around = 4 * queries * 32 + 4 * queries * 33 + 4 * 2  # q, out with log-sum-exp, and the lengths
    assert found["kvjax bf16"]["moves"] == 2 * slots * 32 * 2 + around
    assert found["kvjax int8"]["moves"] == 2 * slots * (32 + 2 * 2) + around  # a scale and a zero of 16 bits each
    assert found["xla f32"]["moves"] == 2 * slots * 32 * 4 + 4 * queries * 32


def test_answers_are_right(records):
    for record in records.values():
        for name, measured in record["entrants"].items():
            if record["op"] != "cache_update":
                limit = 2e-5 if name.startswith(("kvjax", "naive", "definition")) else contest.LARGEST_ERROR
                assert measured["error"] <= limit, name


def test_the_summary_and_the_plots_are_written(folder):
    found = json.loads((folder[0] / "kernels.json").read_text())
    assert found["device"] == jax.devices()[0].device_kind
    assert found["cores"] == len(os.sched_getaffinity(0))
    ours = next(row for row in found["contests"][0]["rows"] if row["name"] == "kvjax int8")
    assert ours["time"]["low"] <= ours["time"]["median"] <= ours["time"]["high"]
    assert ours["bandwidth"] == pytest.approx(ours["moves"] / ours["time"]["median"])
    assert set(ours["ratios"]) == set(ours["processor_ratios"]) == {"kvjax bf16", "xla f32", "naive int8"}
    drawn = {path.name: path.read_text() for path in folder[0].glob("*.svg")}
    assert set(drawn) == {f"kernels_{one['op']}.svg" for one in found["contests"]}
    assert all("<svg" in text for text in drawn.values())


def test_a_terminal_shows_ratios_of_both_times_on_a_cpu(records):
    from rich.console import Console

    console = Console(width=180, record=True, file=io.StringIO())
    report.show(console, records["decode_attention"], "cpu")
    report.show(console, records["decode_attention"], "gpu")
    on_cpu, elsewhere = console.export_text().split("decode_attention:")[1:]
    found = {row.name: row for row in summary.rows(records["decode_attention"])}["kvjax int8"]
    line = next(line for line in on_cpu.splitlines() if line.strip().startswith("kvjax int8 "))
    for base in ("xla f32", "naive int8"):
        assert report.times(found.ratios[base]) in line
        assert f" {found.processor_ratios[base].median:.2f} " in f"{line} "
    assert "processor" not in elsewhere
    assert "jax paged int8 is left out." in elsewhere


def test_codes_are_also_decoded_naively_whatever_the_format():
    size = decode.Size(2, 64, 4, 2, 32)
    found = {e.name: e for e in decode.contest(size, tuple(decode.FORMATS), ()).entrants}
    assert {name for name in found if name.startswith("naive")} == {
        f"naive {name}" for name in ("int8", "int4", "kivi4", "int2", "kivi2")
    }
    assert found["kvjax kivi4"].naive == "naive kivi4"
    assert found["kvjax f32"].naive is None


def test_a_finished_run_measures_nothing_twice(folder, monkeypatch):
    monkeypatch.setattr(contest, "hold", pytest.fail)
    monkeypatch.setattr(plan, "HARDWARE", (UpdateSpec("token", 1, 2, 64, 32, bytes_per_slot=32),))
    before = (folder[0] / "results.jsonl").read_text()
    bench_kernels.main(folder[1])
    assert (folder[0] / "results.jsonl").read_text() == before


def test_everybody_runs_once_a_round_in_changing_order():
    ran = []
    runners = {name: (lambda calls, name=name: ran.append((name, calls))) for name in "abc"}
    laps = race.race(runners, 8, seed=1)
    timed = [name for name, _ in ran[3:]]  # one call each warms up
    rounds = ["".join(timed[i : i + 3]) for i in range(0, 24, 3)]
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert len(set(rounds)) > 1
    assert all(len(one.seconds) == 8 for one in laps.values())


def test_short_programs_are_timed_several_times_in_a_row():
    counts = []
    laps = race.race({"a": counts.append}, 2, least=0.01)["a"]
    assert laps.calls > 1
    assert counts[-1] == laps.calls


def test_ratios_pair_the_times_of_a_round():
    slow, fast = {"seconds": [1.0, 10.0, 4.0]}, {"seconds": [0.5, 2.0, 1.0]}
    assert summary.ratio(slow, fast) == summary.Spread(4.0, 3.0, 4.5)  # of 2, 5 and 4, not of the medians
    slow["processor_seconds"], fast["processor_seconds"] = [3.0, 6.0, 9.0], [1.0, 1.0, 1.0]
    assert summary.ratio(slow, fast, "processor_seconds") == summary.Spread(6.0, 4.5, 7.5)
    assert summary.Spread.of([3.0]) == summary.Spread(3.0, 3.0, 3.0)
    assert report.times(summary.ratio(slow, fast)) == "4.00 (3.00–4.50)"


def made(name, function, expected, nbytes=4096, own=False):
    data = entrant.Data(lambda: (jnp.arange(nbytes // 4, dtype=jnp.float32),), expected)
    return entrant.Entrant(name, data, entrant.compiled(function), nbytes, lambda out: out, own=own)


def held(*entrants, memory=GIB):
    one = contest.Contest("op", {"size": 1}, entrants, ())
    return contest.hold(one, rounds=2, memory=memory, seed=0, advance=lambda: None)


def test_an_entrant_that_computes_something_else_stops_the_benchmark():
    with pytest.raises(NumericsError, match="wrong is wrong by 1 of"):
        held(made("wrong", lambda x: x * 2, lambda x: x))
    with pytest.raises(NumericsError, match="nan"):
        held(made("nan", lambda x: x * jnp.nan, lambda x: x))


def test_who_fails_is_left_out_with_the_reason_but_not_our_own():
    def refuse(x):
        raise NotImplementedError("not on Sundays\nsecond line")

    record = held(made("rival", refuse, None), made("other", lambda x: x + 1, None))
    assert record["left_out"] == {"rival": "NotImplementedError: not on Sundays"}
    assert list(record["entrants"]) == ["other"]
    with pytest.raises(NotImplementedError):
        held(made("ours", refuse, None, own=True))


def test_who_does_not_fit_is_left_out_the_largest_first():
    record = held(made("small", lambda x: x, None), made("large", lambda x: x, None, nbytes=1 << 16), memory=1 << 15)
    assert list(record["entrants"]) == ["small"]
    assert "GiB are needed" in record["left_out"]["large"]


def test_arrays_that_entrants_share_count_once():
    data = entrant.Data(lambda: (jnp.zeros(1024),))
    pair = [entrant.Entrant(name, data, entrant.compiled(lambda x: x.sum()), 1) for name in "ab"]
    assert set(held(*pair, memory=6000)["entrants"]) == {"a", "b"}


@pytest.mark.parametrize("text", ["32", "32:5", "0:8", "8:0", "a:b", "8:2:1"])
def test_heads_that_cannot_be_are_refused(text):
    with pytest.raises(UsageError, match="queries:kv"):
        plan.sizes((), (), (text,), ())


def test_sizes_are_all_combinations():
    found = plan.sizes((1, 4), (128,), ("32:8", "64:8"), (64,))
    assert [(s.batch, s.context, s.query_heads, s.kv_heads, s.head_dim) for s in found] == [
        (1, 128, 32, 8, 64),
        (4, 128, 32, 8, 64),
        (1, 128, 64, 8, 64),
        (4, 128, 64, 8, 64),
    ]
    assert plan.GOAL in plan.ON_CPU


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_on_an_accelerator_named_implementations_take_part(platform, monkeypatch):
    """Whether they run there is found out there; here, that they are asked, by their names."""
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    size = decode.Size(1, 512, 4, 2, 32)
    found = {
        e.name: e for e in decode.contest(size, ("int4",), ("xla", "jax.nn", "tokamax", "torch", "paged")).entrants
    }
    names = [implementation.name for implementation in decode.api.OP.implementations]
    assert {f"kvjax int4, {name}" for name in names if name != "reference"} <= set(found)
    assert {"jax paged bf16", "jax paged int8", "tokamax bf16", "jax.nn bf16"} <= set(found)


def test_paged_attention_gets_what_its_signature_asks_for(monkeypatch):
    """jax's GPU kernel is traced, and its int8 arguments stand for the keys that they were made of."""
    from experiments.bench import rival

    size = decode.Size(2, 256, 4, 2, 32)
    pages = rival._in_pages(decode._plain(size, "bf16"), rival.GPU_PAGE, 8, 32**-0.5)
    q, k, k_scale, v, v_scale = pages.arrays
    plain = decode._plain(size, "bf16").make()
    whole = k.astype(jnp.float32) * k_scale / 127
    back = jnp.moveaxis(whole.reshape(2, 2, 256, 32), 0, 1)
    np.testing.assert_allclose(back, np.asarray(plain[1], np.float32), atol=0.02)
    given = {}

    def paged_attention(q, k, v, table, lengths, **scales):
        given.update(table=table, lengths=lengths, **scales)
        return q

    monkeypatch.setattr(rival.importlib, "import_module", lambda _: SimpleNamespace(paged_attention=paged_attention))
    rival._paged_gpu(q, k, k_scale, v, v_scale, scale=1.0)
    assert given["table"].tolist() == [list(range(16)), list(range(16, 32))]
    assert given["lengths"].tolist() == [256, 256]
    assert given["k_scales_pages"].shape == (2, 32, 16)
