"""A process with its own environment, folder and time limit, whose end does not matter to anybody else."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

#: All that a compiling process takes over; anything else (XLA_FLAGS, a compilation cache) would change what it dumps.
INHERITED = ("PATH", "HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "VIRTUAL_ENV")


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code (negative: the signal), or None if it ran out of time."""

    code: int | None
    reason: str = ""


def environment(folder: Path, variables: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process that works in `folder`: jax on the CPU, no cache of compilations."""
    root = Path(__file__).resolve().parent.parent.parent
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **{name: os.environ[name] for name in INHERITED if name in os.environ},
        "PYTHONPATH": os.pathsep.join(paths),
        "TMPDIR": str(folder),
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        **variables,
    }


def run(command: Sequence[str], folder: Path, variables: Mapping[str, str], limit: float) -> Ended:
    """Runs a command in `folder`, which gets its `stdout` and `stderr`, for at most `limit` seconds."""
    with (folder / "stdout").open("wb") as out, (folder / "stderr").open("wb") as err:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment(folder, variables),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            return Ended(None, f"not compiled after {limit:g} s")
        finally:
            # Compilers start helpers; the whole session ends with its first process.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return Ended(code, "" if code == 0 else _why(code, (folder / "stderr").read_text(errors="replace")))


def _why(code: int, stderr: str) -> str:
    """The line that says why a process died: a failed check of the compiler, else an exception, else the exit."""
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    fatal = re.search(r"^F\d{4} \S+\s+\d+ (?P<where>\S+)\] (?P<text>.+)$", stderr, flags=re.MULTILINE)
    if fatal:
        # Less the instruction of this compilation that failed the check, and the place in a source that nobody has.
        text = re.sub(r"Check failed: \w+\(\) is OK \(|INTERNAL: |LLO_CHECK failure \(\S+\) ", "", fatal["text"])
        return f"{how}: {text.split(', for operand')[0]}"[:300]
    raised = re.findall(r"^(?:\w+\.)*\w*(?:Error|Exception|Interrupt)\b.*$", stderr, flags=re.MULTILINE)
    return f"{how}: {raised[-1]}"[:300] if raised else how
