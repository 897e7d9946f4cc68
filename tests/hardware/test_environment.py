"""The environment that `make test-hardware` makes, and the versions that the committed table names."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from experiments.hardware_table import golden
from experiments.hardware_table.target import TARGETS

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPT = ROOT / ".ci" / "hardware"


def pins() -> dict[str, str]:
    """Package -> pinned version, of both files of constraints."""
    lines = [
        line
        for name in ("constraints.txt", "constraints-hardware.txt")
        for line in (ROOT / name).read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    ]
    found = [re.fullmatch(r'([\w.-]+)==([\w.]+)(; python_version < "3\.12")?', line) for line in lines]
    assert all(found), lines
    return {pin[1]: pin[2] for pin in found if pin}


def test_the_committed_table_was_made_with_what_is_pinned():
    pinned = pins()
    for name, versions in golden.load().versions.items():
        assert {package: pinned.get(package) for package in versions} == versions, name


def test_every_compiler_is_pinned():
    needed = {package for target in TARGETS for package in target.toolchain.packages}
    assert needed <= set(pins())


def test_the_script_parses_and_the_check_of_a_change_calls_it():
    assert os.access(SCRIPT, os.X_OK)
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True, timeout=30)
    assert "set -euo pipefail" in SCRIPT.read_text()
    run = (ROOT / ".ci" / "run").read_text()
    assert run.index("make test\n") < run.index("make test-hardware\n")


@pytest.fixture
def checkout(tmp_path):
    """A checkout in which `python -m venv` makes an environment whose pip says what the test wants."""
    (tmp_path / ".ci").mkdir()
    script = tmp_path / ".ci" / "hardware"
    script.write_text(SCRIPT.read_text())
    finder = tmp_path / ".ci" / "find-python"
    finder.write_text(f"#!/bin/sh\necho {tmp_path}/python\n")
    for name in ("pyproject.toml", "constraints.txt", "constraints-hardware.txt"):
        (tmp_path / name).write_text("")
    python = tmp_path / "python"
    python.write_text(
        f"""#!/bin/sh
case "$*" in
  "-m venv"*) mkdir -p {tmp_path}/.venv-hardware/bin; cp "$0" {tmp_path}/.venv-hardware/bin/python ;;
  *metadata*) echo 0.10.2 ;;
  "-m pytest"*) echo "tests ran" ;;
  "-m pip"*) echo "$*" >>{tmp_path}/asked; . {tmp_path}/pip ;;
esac
"""
    )
    for path in (script, finder, python):
        path.chmod(0o755)
    return tmp_path


def run(checkout: Path, pip: str) -> subprocess.CompletedProcess[str]:
    (checkout / "pip").write_text(pip)
    return subprocess.run([checkout / ".ci" / "hardware"], capture_output=True, text=True, timeout=60)


def test_it_installs_once_and_runs_the_tests(checkout):
    first, second = run(checkout, "exit 0\n"), run(checkout, "exit 1\n")
    assert (first.returncode, second.returncode) == (0, 0)
    assert "tests ran" in first.stdout and "tests ran" in second.stdout
    asked = (checkout / "asked").read_text().splitlines()
    assert len(asked) == 3 and "jax[tpu]==0.10.2" in asked[1] and "jax-cuda13-plugin==0.10.2" in asked[2]
    assert all("--constraint constraints-hardware.txt" in line for line in asked)


def test_without_packages_for_this_platform_it_is_skipped_with_the_reason(checkout):
    told = run(checkout, 'echo "ERROR: No matching distribution found for this"; exit 1\n')
    assert told.returncode == 0 and "tests ran" not in told.stdout
    assert "skipped" in told.stdout and "No matching distribution found for this" in told.stdout


def test_with_one_compiler_its_tests_run(checkout):
    pip = 'case "$*" in *tpu*) echo "ERROR: No matching distribution found for libtpu"; exit 1 ;; esac\n'
    told = run(checkout, pip)
    assert told.returncode == 0 and "kernels for TPUs: skipped" in told.stdout and "tests ran" in told.stdout


def test_any_other_failure_of_pip_fails(checkout):
    told = run(checkout, 'echo "ERROR: conflicting dependencies"; exit 1\n')
    assert told.returncode == 1 and "conflicting dependencies" in told.stderr
