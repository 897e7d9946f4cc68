"""What a run ran on: versions, devices and the revision of the code. Of the variables only those named here."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "kvjax",
    "jax",
    "jaxlib",
    "libtpu",
    "jax-cuda12-plugin",
    "jax-cuda13-plugin",
    "flax",
    "optax",
    "orbax-checkpoint",
    "tensorstore",
    "numpy",
    "tokenizers",
)
VARIABLES = ("XLA_FLAGS", "JAX_PLATFORMS", "JAX_ENABLE_X64", "JAX_DEFAULT_MATMUL_PRECISION")


def describe() -> dict[str, Any]:
    """The command, host, versions, devices and revision, for run.json. Starts the jax backend."""
    return {
        "command": command(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu_count": os.cpu_count(),
        "versions": versions(),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "devices": devices(),
        "git": revision(),
    }


def command() -> str:
    """The command line of this process, with the program's name in place of its path."""
    program = Path(sys.argv[0]).name
    return shlex.join(["kvjax" if program in ("kvjax", "__main__.py") else program, *sys.argv[1:]])


def versions() -> dict[str, str]:
    """The versions of the packages that results depend on, of those that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def devices() -> list[dict[str, Any]]:
    """Kinds of devices that jax uses, with their number."""
    import jax

    kinds: dict[tuple[str, str], int] = {}
    for device in jax.devices():
        kinds[device.platform, device.device_kind] = kinds.get((device.platform, device.device_kind), 0) + 1
    return [{"platform": name, "kind": kind, "count": count} for (name, kind), count in kinds.items()]


def revision() -> dict[str, Any] | None:
    """Commit and whether there are uncommitted changes, or None where kvjax does not run from a checkout."""
    root = Path(__file__).resolve().parent.parent
    try:
        # Installed in an environment inside someone else's checkout, these files are not tracked: no revision.
        _git(root, "ls-files", "--error-unmatch", "kvjax/__init__.py")
        return {"commit": _git(root, "rev-parse", "HEAD"), "dirty": bool(_git(root, "status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    answer = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True, timeout=10)
    return answer.stdout.strip()
