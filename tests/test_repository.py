"""What holds for every file of the repository: nothing of one machine, nothing unfinished, nothing too long to read."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from experiments.__main__ import COMMANDS

ROOT = Path(__file__).resolve().parent.parent

LONGEST_FILE = 400
USUAL_FILE = 300
MOST_LONGER_THAN_USUAL = 0.05

#: Where packages come from and where files lie differs between machines, so no file says it.
HOSTS = re.compile(r"(?i)\b(pypi\.org|pythonhosted\.org|download\.pytorch|index[-_]url|find[-_]links|hf\.co/)")
MACHINE = re.compile(r"(?<![\w.~}])/(root|home|work|opt|Users|mnt)/\w")
UNFINISHED = re.compile(r"\b(TODO|FIXME|XXX|NotImplementedYet)\b")


def files() -> list[Path]:
    """The text files that git knows or would add; everything but the obvious where git is missing."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        names = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
        paths = [ROOT / name for name in names]
    except (OSError, subprocess.SubprocessError):
        paths = [
            p for package in ("kvjax", "pallas_kernels", "experiments", "tests") for p in (ROOT / package).rglob("*")
        ]
    assets = ROOT / "kvjax" / "assets"
    return [path for path in paths if path.is_file() and assets not in path.parents and path != Path(__file__)]


TEXTS = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in files() if path.suffix != ".png"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.mark.parametrize("pattern", [HOSTS, MACHINE, UNFINISHED], ids=["hosts", "machine paths", "unfinished"])
def test_no_file_says(pattern):
    found = [
        f"{name}:{number}: {line.strip()}"
        for name, text in TEXTS.items()
        for number, line in enumerate(text.splitlines(), start=1)
        if pattern.search(line)
    ]
    assert found == []


def test_files_are_short_enough_to_read():
    lengths = {name: text.count("\n") for name, text in TEXTS.items() if name.endswith(".py")}
    assert {name: n for name, n in lengths.items() if n > LONGEST_FILE} == {}
    longer = sorted(name for name, n in lengths.items() if n > USUAL_FILE)
    assert len(longer) <= MOST_LONGER_THAN_USUAL * len(lengths), longer


def test_constraints_are_names_and_versions_only():
    lines = [line for line in TEXTS["constraints.txt"].splitlines() if line and not line.startswith("#")]
    for line in lines:
        assert re.fullmatch(r'[\w.-]+==[\w.]+(; python_version < "3\.12")?', line), line
    marked = {line.split("==")[0] for line in lines if ";" in line}
    assert marked == {"jax", "jaxlib", "flax"}


def test_every_dependency_is_pinned_and_jax_has_no_upper_bound():
    pinned = {
        line.split("==")[0].lower().replace("_", "-") for line in TEXTS["constraints.txt"].splitlines() if "==" in line
    }
    extras = PROJECT["optional-dependencies"]
    needed = [*PROJECT["dependencies"], *extras["test"], *extras["hf"], *extras["data"]]
    names = {re.split(r"[<>=\[]", requirement)[0].lower().replace("_", "-") for requirement in needed}
    assert names - pinned == set()
    assert "jax>=0.10.2" in PROJECT["dependencies"]


def test_what_runs_here_is_what_the_metadata_asks_for():
    for requirement in PROJECT["dependencies"]:
        name, least = requirement.split(">=")
        installed = tuple(int(part) for part in re.findall(r"\d+", metadata.version(name))[:3])
        assert installed >= tuple(int(part) for part in least.split(".")), requirement


@pytest.mark.parametrize("package", ["kvjax", "pallas_kernels", "experiments"])
def test_every_package_is_typed(package):
    assert (ROOT / package / "py.typed").exists()
    folders = {path.parent for path in (ROOT / package).rglob("*.py")}
    assert {folder for folder in folders if not (folder / "__init__.py").exists()} == set()


def test_the_documents_name_only_commands_that_exist():
    for name in ("README.md", "CONTRIBUTING.md"):
        named = set(re.findall(r"^\s*!?(?:\.venv/bin/)?kvjax ([a-z]\w*)", TEXTS[name], flags=re.MULTILINE))
        assert named <= set(COMMANDS), name
        fenced = re.findall(r"```.*?```", TEXTS[name], flags=re.DOTALL)
        code = [*fenced, *re.findall(r"`[^`]+`", re.sub(r"```.*?```", "", TEXTS[name], flags=re.DOTALL))]
        targets = {target for part in code for target in re.findall(r"^`?make ([a-z][\w-]*)", part, flags=re.MULTILINE)}
        assert targets <= set(re.findall(r"^([a-z][\w-]*):", TEXTS["Makefile"], flags=re.MULTILINE)), name


def test_links_between_documents_lead_somewhere():
    for name, text in TEXTS.items():
        if name.endswith(".md"):
            for target in re.findall(r"\]\((?!https?://|#)([^)#\s]+)", text):
                assert (ROOT / name).parent.joinpath(target).exists(), f"{name} links to {target}"


@pytest.fixture
def shims(tmp_path):
    """A PATH on which `python3.12` is a shim of a version that is switched off, and python3.13 works."""
    broken, works = tmp_path / "python3.12", tmp_path / "python3.13"
    broken.write_text("#!/bin/sh\necho 'python3.12: command not found' >&2\nexit 127\n")
    works.write_text("#!/bin/sh\nexit 0\n")
    for path in (broken, works):
        path.chmod(0o755)
    return f"{tmp_path}{os.pathsep}{os.defpath}"


def find_python(path: str, *versions: str) -> subprocess.CompletedProcess[str]:
    command = [str(ROOT / ".ci" / "find-python"), *versions]
    return subprocess.run(command, env={"PATH": path}, capture_output=True, text=True, timeout=60)


def test_an_interpreter_that_does_not_run_is_passed_over(shims, tmp_path):
    found = find_python(shims, "3.12", "3.13")
    assert found.stdout.strip() == str(tmp_path / "python3.13")
    none = find_python(shims, "3.12", "3.99")
    assert (none.returncode, none.stdout) == (1, "")


@pytest.mark.parametrize("script", [".ci/run", ".ci/next", ".ci/find-python"])
def test_scripts_are_executable_and_parse(script):
    assert os.access(ROOT / script, os.X_OK)
    subprocess.run(["bash", "-n", str(ROOT / script)], check=True, timeout=30)
    assert "set -euo pipefail" in TEXTS[script]
