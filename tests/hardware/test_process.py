"""A compiler that dies, hangs or litters hurts nobody else."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from experiments.hardware_table import process


def python(code: str, folder, limit: float = 30.0, **variables: str) -> process.Ended:
    return process.run([sys.executable, "-c", code], folder, variables, limit)


def test_output_stays_in_the_folder_and_the_environment_is_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--leaks")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "somewhere")
    code = "import os, tempfile; print(sorted(os.environ), os.getcwd(), tempfile.gettempdir())"
    assert python(code, tmp_path, LIBTPU_INIT_ARGS="--x") == process.Ended(0)
    said = (tmp_path / "stdout").read_text()
    assert "LIBTPU_INIT_ARGS" in said and "JAX_PLATFORMS" in said
    assert "XLA_FLAGS" not in said and "JAX_COMPILATION_CACHE_DIR" not in said
    assert said.count(str(tmp_path)) == 2


@pytest.mark.parametrize(
    ("code", "ended"),
    [
        ("import os; os.abort()", process.Ended(-6, "killed by SIGABRT")),
        ("raise ValueError('of no use')", process.Ended(1, "exit code 1: ValueError: of no use")),
        ("import sys; sys.exit(7)", process.Ended(7, "exit code 7")),
        (
            "import os, sys; sys.stderr.write('noise\\nF1123 09:29:08.07 352 llo.cc:15] Check failed: TakeStatus() is "
            "OK (INTERNAL: LLO_CHECK failure (xla/region.cc:393) type_check_result.ok() Expected int16, got bf16, for "
            "operand #0 of instruction %4\\n*** stack ***\\n'); sys.stderr.flush(); os.abort()",
            process.Ended(-6, "killed by SIGABRT: type_check_result.ok() Expected int16, got bf16"),
        ),
        (
            "import os, sys; sys.stderr.write('F1123 09:29:08.07  3523 dumper.cc:15] No model of this chip.'); "
            "sys.stderr.flush(); os.abort()",
            process.Ended(-6, "killed by SIGABRT: No model of this chip."),
        ),
    ],
)
def test_why_a_process_died(code, ended, tmp_path):
    assert python(code, tmp_path) == ended


def test_a_process_that_hangs_is_ended_with_its_children(tmp_path):
    code = (
        "import os, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "open('child', 'w').write(str(child.pid))\n"
        "time.sleep(60)"
    )
    start = time.monotonic()
    ended = python(code, tmp_path, limit=2.0)
    assert ended.code is None and "after 2 s" in ended.reason
    assert time.monotonic() - start < 20
    child = int((tmp_path / "child").read_text())
    assert not alive(child)


def alive(pid: int) -> bool:
    """Whether a process still runs; it takes the system a moment to end it. One that waits to be reaped does not."""
    for _ in range(100):
        try:
            os.kill(pid, 0)
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return False
        if state == "Z":
            return False
        time.sleep(0.05)
    return True
