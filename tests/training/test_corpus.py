"""What is held out stays out of the training text."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest

from experiments.tokenizer import HELD_OUT_MODULES, held_out, lines_of, modules, training_files
from kvjax.assets import HELDOUT, heldout_text

LONG = [f"    value_{i} = compute_something(argument_{i})" for i in range(40)]


def test_heldout_asset():
    text = heldout_text()
    assert 0.9e6 < len(text.encode()) < 1.3e6
    assert "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2" in (HELDOUT.parent / "LICENSE").read_text()
    headers = {line.split()[-1] for line in text.splitlines() if line.startswith("# ==== ")}
    assert {Path(name).parts[0].removesuffix(".py") for name in headers} == set(HELD_OUT_MODULES)


def test_held_out_by_module():
    assert held_out("argparse.py") and held_out("json/decoder.py") and held_out("http/server.py")
    assert not held_out("asyncio/queue.py") and not held_out("jsonx.py") and not held_out("_strptime.py")


def test_near_duplicates_are_left_out():
    heldout = "\n".join(LONG)
    files = [
        ("argparse.py", "anything"),
        ("copied.py", "\n".join(LONG[:10] + [f"{line} + 1" for line in LONG[10:40]])),
        ("alike.py", "\n".join(LONG[:3] + [f"{line} + 1" for line in LONG[3:40]])),
        ("empty.py", ""),
    ]
    assert [name for name, _ in training_files(files, heldout)] == ["alike.py", "empty.py"]


def test_no_training_file_of_this_python_holds_heldout_text():
    files = list(modules(Path(sysconfig.get_paths()["stdlib"])))
    if sum(len(text) for _, text in files) < 5_000_000:
        pytest.skip("this Python was installed without its library's source")
    heldout = heldout_text()
    kept = training_files(files, heldout)
    assert len(kept) > 300 and not any(held_out(name) for name, _ in kept)
    known = lines_of(heldout)
    for name, text in kept:
        lines = lines_of(text)
        assert len(lines & known) <= 0.1 * len(lines), name
