"""`kvjax compare`, `kvjax demo` and `kvjax generate` around the tiny model."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import experiments
import kvjax
from experiments import compare, compile_cache, demo, generate
from kvjax.cache import methods
from kvjax.errors import UsageError
from kvjax.evaluation import defaults
from kvjax.evaluation.plan import Options
from kvjax.evaluation.workload import expand


@pytest.fixture(autouse=True)
def tiny(model, monkeypatch):
    monkeypatch.setattr(kvjax, "load", lambda name: model, raising=False)


def config(folder: Path, **changes) -> compare.Config:
    given = {
        "methods": ("h2o", "int8"),
        "tasks": ("needle", "kv"),
        "context": (128,),
        "seeds": 2,
        "examples": 2,
        "batch": 2,
        "budget": "int8",
    }
    return compare.Config(**{**given, "out": folder, **changes})


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_sweep_that_died_skips_what_it_finished(tmp_path, monkeypatch, capsys):
    folder, wanted = tmp_path / "run", 5 * 2 * 2
    from experiments import record

    append, written = record.Run.append, []

    def dies(run, result):
        append(run, result)
        written.append(result)
        if len(written) == 6:
            raise KeyboardInterrupt

    monkeypatch.setattr(record.Run, "append", dies)
    with pytest.raises(KeyboardInterrupt):
        compare.main(config(folder))
    assert len(lines(folder)) == 6
    compare.main(config(folder))
    keys = [(r["method"], r["task"], r["context"], r["seed"]) for r in lines(folder)]
    assert len(keys) == len(set(keys)) == wanted == len(written)
    out = capsys.readouterr().out
    assert "int8" in out and str(folder / "report.html") in out
    assert (folder / "report.html").is_file()
    assert json.loads((folder / "run.json").read_text())["exit"] == "finished"


def test_another_configuration_may_not_go_on_in_a_run_folder(tmp_path):
    compare.main(config(tmp_path / "run", tasks=("needle",)))
    with pytest.raises(UsageError, match="another configuration"):
        compare.main(config(tmp_path / "run", tasks=("kv",)))


def test_nothing_is_made_for_a_comparison_that_cannot_run(tmp_path):
    with pytest.raises(UsageError, match="beyond the 256 positions"):
        compare.main(config(tmp_path / "run", context=(4096,)))
    assert not (tmp_path / "run").exists()


def test_the_demo_compares_about_eight_methods_at_one_budget():
    names = {"full", "random", "streaming_llm", *demo.METHODS}
    assert 7 <= len(names) <= 9 and 3 <= len(expand(defaults.TASKS)) <= 4
    for name in demo.EVICTING:
        assert methods.parse(name).budget.evicts
    assert not methods.parse(demo.KEEPER).budget.evicts


def test_the_command_and_the_library_measure_the_same_unless_told_otherwise():
    library = {name: parameter.default for name, parameter in inspect.signature(kvjax.compare).parameters.items()}
    command = compare.Config()
    for field in set(library) & {field.name for field in dataclasses.fields(command)} - {"model", "context"}:
        assert library[field] == getattr(command, field), field
    assert dataclasses.asdict(Options()).items() <= library.items()


def test_defaults_are_known_names():
    for name in defaults.METHODS:
        methods.parse(name)
    assert expand(defaults.TASKS) == list(defaults.TASKS)


def test_generate_streams_the_same_text_that_it_returns(model, capsys):
    prompt = "def main(self):\n    return "
    generate.main(generate.Config(prompt=prompt, max_new_tokens=20, method="int4", temperature=1.0, seed=3))
    first = capsys.readouterr()
    from kvjax.engine.generate import generate as engine
    from kvjax.engine.sampling import Sampler

    expected = engine(model, prompt, "int4", max_new_tokens=20, sampler=Sampler(1.0), seed=3)
    assert first.out == prompt + expected.text + "\n"
    assert "% of a full one" in first.err


def test_a_stream_in_pieces_is_the_whole_text(model, capsys):
    text = "naïve → β and more"
    stream, shown = generate.Stream(model), []
    for token in model.tokenizer.encode(text, special=False):
        stream(np.array([[token, -1]], np.int32))
        shown.append(capsys.readouterr().out)
    stream.close()
    assert all("\ufffd" not in piece for piece in shown) and len(shown) > 5
    assert "".join(shown) + capsys.readouterr().out == text + "\n"


def test_compiled_programs_are_kept_where_only_the_user_can_write(tmp_path):
    code = (
        "from experiments import compile_cache; print(compile_cache.enable())\n"
        "import jax; print(jax.config.jax_compilation_cache_dir)"
    )
    clean = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    environment = clean | {"XDG_CACHE_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    root = Path(experiments.__file__).parent.parent
    made = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=root, capture_output=True, text=True, check=True
    )
    first, second = made.stdout.split()
    assert first == second and Path(first).is_relative_to(tmp_path / "kvjax" / "xla")
    assert stat.S_IMODE(Path(first).stat().st_mode) & 0o022 == 0
    chosen = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | {compile_cache.VARIABLE: str(tmp_path / "mine")},
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    )
    assert chosen.stdout.split() == [str(tmp_path / "mine")] * 2


def test_a_folder_that_others_can_write_to_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(compile_cache.VARIABLE, raising=False)
    folder = compile_cache.user_folder() / "xla" / compile_cache.machine()
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    assert compile_cache.enable() is None


@pytest.mark.parametrize("name", ["compare", "demo", "generate", "compile_cache"])
def test_command_modules_import_jax_late(name):
    tree = ast.parse((Path(experiments.__file__).parent / f"{name}.py").read_text())
    top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    imported = {alias.name for node in top for alias in node.names} | {getattr(node, "module", None) for node in top}
    assert not {"jax", "numpy", "kvjax.engine", "kvjax.cache"} & imported
    code = f"import sys, experiments.{name}; assert not {{'jax', 'numpy'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=Path(experiments.__file__).parent.parent, check=True)
