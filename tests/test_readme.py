"""What the README shows is run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from experiments.__main__ import main

README = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")


def blocks(section: str, language: str = "") -> list[str]:
    """The code blocks of a section."""
    text = README.split(f"\n## {section}\n")[1].split("\n## ")[0]
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.mark.slow
def test_the_library_examples_run(capsys):
    names: dict = {}
    for block in blocks("From Python", "python"):
        exec(compile(block, "README.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "snapkv:tokens=128+int4" in printed and "streaming_llm" in printed
    assert names["comparison"].records


@pytest.mark.parametrize("line", blocks("From the command line")[0].splitlines())
def test_the_commands_parse(line, monkeypatch):
    """Every option that the README shows exists: its command is parsed, and not run."""
    import importlib
    import shlex

    from experiments.__main__ import COMMANDS

    program, name, *options = shlex.split(line)
    assert program == "kvjax"
    seen = []
    module = importlib.import_module(COMMANDS[name].module)
    monkeypatch.setattr(module, "main", seen.append)
    assert main([name, *options]) == 0
    assert isinstance(seen[0], module.Config)


@pytest.mark.parametrize(
    ("driver", "devices", "extra", "backend"),
    [
        ("550.54.15\n", [], "[cuda12]", "gpu"),
        ("580.82.07\n", [], "[cuda13]", "gpu"),
        ("", ["/dev/accel0"], "[tpu]", "tpu"),
        ("", ["/dev/vfio/0"], "[tpu]", "tpu"),
        ("No devices were found\n", [], "", "cpu"),
        ("", [], "", "cpu"),
    ],
)
def test_the_colab_cell_installs_what_fits_the_runtime(monkeypatch, driver, devices, extra, backend):
    commands = []

    def run(command, **_):
        commands.append(command)
        return SimpleNamespace(stdout=driver)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(shutil, "which", lambda name: f"bin/{name}" if driver else None)
    monkeypatch.setattr(os.path, "exists", lambda path: path in devices)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.delenv("COLAB_TPU_ADDR", raising=False)
    (cell,) = blocks("Colab", "python")
    exec(compile(cell, "README.md", "exec"), {})
    assert commands[-1] == [sys.executable, "-m", "pip", "install", "-q", "-U", f"./kvjax{extra}"]
    monkeypatch.setattr(jax, "default_backend", lambda: "somewhere else")
    with pytest.raises(AssertionError, match="restart the runtime"):
        exec(compile(cell, "README.md", "exec"), {})
