"""Run folders: nothing measured is lost, nothing finished is measured twice, nothing is mixed up."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from experiments import environment
from experiments.record import open_run, read_results, write_atomically
from kvjax.errors import CorruptDataError, KvjaxError, UsageError


@dataclasses.dataclass(frozen=True)
class Config:
    methods: tuple[str, ...] = ("full", "int4")
    share: float = 0.25
    out: Path | None = None


def test_a_run_records_what_was_asked_and_on_what_it_ran(tmp_path):
    out = tmp_path / "run"
    with open_run("compare", Config(out=out), out=out, seeds=(3, 4)) as run:
        assert json.loads((out / "run.json").read_text())["exit"] == "running"
        run.append({"method": "full", "score": np.float32(0.5), "bytes": np.int64(7), "layers": np.arange(2)})
    assert json.loads((out / "config.json").read_text()) == {
        "methods": ["full", "int4"],
        "share": 0.25,
        "out": str(out),
    }
    info = json.loads((out / "run.json").read_text())
    assert info["exit"] == "finished"
    assert info["seeds"] == [3, 4]
    assert info["start"] <= info["end"]
    assert info["versions"]["jax"] and info["versions"]["kvjax"] and info["python"]
    assert info["devices"] == [{"platform": "cpu", "kind": "cpu", "count": 8}]
    assert read_results(out / "results.jsonl") == [{"method": "full", "score": 0.5, "bytes": 7, "layers": [0, 1]}]


@pytest.mark.parametrize(
    ("error", "reason"), [(KeyboardInterrupt(), "interrupted"), (ValueError("too long"), "ValueError: too long")]
)
def test_the_reason_of_an_early_end_is_recorded(tmp_path, error, reason):
    with pytest.raises(type(error)), open_run("compare", Config(), out=tmp_path):
        raise error
    assert json.loads((tmp_path / "run.json").read_text())["exit"] == reason


def test_a_run_goes_on_where_it_stopped(tmp_path):
    with open_run("compare", Config(), out=tmp_path) as run:
        run.append({"method": "full", "task": "kv", "seed": 0})
    with open_run("compare", Config(out=Path("elsewhere")), out=tmp_path) as run:
        assert run.finished(method="full", task="kv", seed=0)
        assert not run.finished(method="full", task="kv", seed=1)
        run.append({"method": "full", "task": "kv", "seed": 1})
        assert run.finished(method="full", task="kv", seed=1)
    assert len(read_results(tmp_path / "results.jsonl")) == 2
    earlier = json.loads((tmp_path / "run.json").read_text())["earlier"]
    assert [attempt["exit"] for attempt in earlier] == ["finished"]


def test_another_configuration_in_the_same_folder_is_refused_with_the_difference(tmp_path):
    with open_run("compare", Config(), out=tmp_path) as run:
        run.append({"method": "full"})
    with pytest.raises(UsageError) as refused, open_run("compare", Config(share=0.5), out=tmp_path):
        pass
    assert '-  "share": 0.25' in str(refused.value)
    assert '+  "share": 0.5' in str(refused.value)
    assert "methods" not in str(refused.value)
    assert read_results(tmp_path / "results.jsonl") == [{"method": "full"}]


def test_a_folder_with_results_of_something_else_is_refused(tmp_path):
    (tmp_path / "results.jsonl").write_text("mine\n")
    with pytest.raises(UsageError, match=r"results\.jsonl but no config\.json"), open_run("x", Config(), out=tmp_path):
        pass
    assert (tmp_path / "results.jsonl").read_text() == "mine\n"


def test_a_torn_last_line_is_dropped_and_the_next_record_is_whole(tmp_path):
    with open_run("compare", Config(), out=tmp_path) as run:
        run.append({"seed": 0})
    path = tmp_path / "results.jsonl"
    path.write_text(path.read_text() + '{"seed": 1, "sco')
    assert read_results(path) == [{"seed": 0}]
    with open_run("compare", Config(), out=tmp_path) as run:
        assert not run.finished(seed=1)
        run.append({"seed": 1})
    assert path.read_text() == '{"seed": 0}\n{"seed": 1}\n'


def test_damage_in_the_middle_is_named(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text('{"seed": 0}\n{"se\n{"seed": 2}\n')
    with pytest.raises(CorruptDataError, match="line 2"):
        read_results(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), np.float32("nan")])
def test_a_number_that_is_none_stops_the_run(tmp_path, value):
    with pytest.raises(KvjaxError, match="not a finite number"), open_run("x", Config(), out=tmp_path) as run:
        run.append({"method": "int2", "score": value})
    assert (tmp_path / "results.jsonl").read_text() == ""


def test_two_processes_do_not_write_to_one_folder(tmp_path):
    with (
        open_run("compare", Config(), out=tmp_path),
        pytest.raises(UsageError, match="another process"),
        open_run("compare", Config(), out=tmp_path),
    ):
        pass


def test_new_folders_never_collide(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = []
    for _ in range(3):
        with open_run("demo", Config()) as run:
            folders.append(run.folder)
    assert len(set(folders)) == 3
    assert all(folder.parent == Path("runs") and "-demo" in folder.name for folder in folders)


@pytest.mark.parametrize("name", ["../x", "a/b", "", "A", "x y", "."])
def test_a_name_is_never_a_path(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="lower-case"), open_run(name, Config()):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_a_usage_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot make"), open_run("x", Config(), out=tmp_path / "file" / "run"):
        pass


def test_a_killed_sweep_skips_what_it_finished(tmp_path):
    """kill -9 between two measurements; the second start measures only the rest, each cell once."""
    program = textwrap.dedent(
        """
        import dataclasses, os, signal, sys
        from pathlib import Path
        from experiments.record import open_run

        @dataclasses.dataclass(frozen=True)
        class Config:
            cells: int = 6

        with open_run("sweep", Config(), out=Path(sys.argv[1])) as run:
            for seed in range(6):
                if run.finished(seed=seed):
                    continue
                run.append({"seed": seed, "process": os.getpid()})
                if seed == 2:
                    os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    killed = subprocess.run(command, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert json.loads((tmp_path / "run.json").read_text())["exit"] == "running"
    assert subprocess.run(command, timeout=60).returncode == 0
    records = read_results(tmp_path / "results.jsonl")
    assert [record["seed"] for record in records] == list(range(6))
    assert len({record["process"] for record in records[:3]}) == 1
    assert records[0]["process"] != records[3]["process"]
    (earlier,) = json.loads((tmp_path / "run.json").read_text())["earlier"]
    assert earlier["exit"] == "killed"


def test_a_replaced_file_is_never_half_there(tmp_path):
    path = tmp_path / "run.json"
    write_atomically(path, "old")
    write_atomically(path, "new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_the_environment_holds_no_variable_that_is_not_named(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret-value")
    monkeypatch.setenv("XLA_FLAGS", "--xla_something")
    described = environment.describe()
    assert "secret-value" not in json.dumps(described)
    assert described["variables"]["XLA_FLAGS"] == "--xla_something"


def test_the_revision_is_that_of_the_code_not_of_the_current_folder(tmp_path, monkeypatch):
    here = environment.revision()
    monkeypatch.chdir(tmp_path)
    assert environment.revision() == here
