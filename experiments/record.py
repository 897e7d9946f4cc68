"""A run folder: what was asked, on what it ran, and one line of results after another.

config.json    the resolved configuration
run.json       command, versions, devices, seeds, revision, start, end, exit reason
results.jsonl  one record a line, flushed as it is measured

A run that was killed goes on when it is started again with the same configuration in the same folder: what
`results.jsonl` holds is not measured twice.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from experiments import environment
from kvjax.errors import CorruptDataError, NumericsError, UsageError

Record = dict[str, Any]

FILES = ("config.json", "run.json", "results.jsonl", "report.html")


@dataclasses.dataclass
class Run:
    """An open run folder; made by `open_run`."""

    folder: Path
    config: Record
    info: Record
    records: list[Record]
    _results: TextIO

    def append(self, record: Mapping[str, Any]) -> None:
        """Adds one record; it is on disk when this returns. Raises NumericsError for a NaN or an infinity."""
        record = dict(record)
        try:
            line = json.dumps(record, allow_nan=False, default=_plain)
        except ValueError as error:
            raise NumericsError(f"a measurement is not a finite number, so the run stops: {record}") from error
        self._results.write(line + "\n")
        self._results.flush()
        os.fsync(self._results.fileno())
        self.records.append(json.loads(line))

    def finished(self, **key: Any) -> bool:
        """Whether a record with these values is already there."""
        return any(all(record.get(name) == value for name, value in key.items()) for record in self.records)


@contextlib.contextmanager
def open_run(name: str, config: Any, *, out: Path | None = None, seeds: Sequence[int] = ()) -> Iterator[Run]:
    """Opens `out`, or a new folder `runs/<time>-<name>`, for the duration of a `with` block.

    Args:
      name: of the experiment, in lower case; the run folder's name ends with it.
      config: a dataclass. Its field `out`, if any, is not part of what a resumed run compares.
      out: a folder to make, or one whose run with the same configuration is to go on.
      seeds: recorded in run.json.

    Raises:
      UsageError: the folder holds a run with another configuration (the message shows the difference), holds
        files of these names that are no run, or another process is writing to it.
      CorruptDataError: a line in the middle of results.jsonl is damaged.
    """
    folder = _new_folder(name) if out is None else Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"cannot make the run folder {folder}: {error.strerror}. Choose another with --out."
        ) from error
    resolved = resolve(config)
    _claim(folder, resolved)
    with _open_results(folder / "results.jsonl") as results:
        run = Run(folder, resolved, _begin(folder, seeds), read_results(folder / "results.jsonl"), results)
        try:
            yield run
        except BaseException as error:
            _end(run, "interrupted" if isinstance(error, KeyboardInterrupt) else f"{type(error).__name__}: {error}")
            raise
        _end(run, "finished")


def resolve(config: Any) -> Record:
    """The JSON form of a configuration dataclass: paths as strings, tuples as lists."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=_plain))


def read_results(path: Path) -> list[Record]:
    """The records of a results.jsonl, without a last line that a killed process left half written."""
    if not path.exists():
        return []
    *lines, _torn = path.read_text(encoding="utf-8").split("\n")
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise CorruptDataError(
                f"{path}, line {number} is not JSON ({error.msg}). Remove that line to measure it again."
            ) from error
    return records


def write_atomically(path: Path, text: str) -> None:
    """Replaces a file in one step: a reader, or a crash, sees the old text or the new one, never a part."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _new_folder(name: str) -> Path:
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name):
        raise UsageError(f"a run's name is lower-case words joined by hyphens, not {name!r}")
    stem = Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}-{name}"
    folder, number = stem, 1
    while folder.exists():
        number += 1
        folder = stem.with_name(f"{stem.name}-{number}")
    return folder


def _claim(folder: Path, config: Record) -> None:
    path = folder / "config.json"
    if not path.exists():
        found = [name for name in FILES if (folder / name).exists()]
        if found:
            raise UsageError(f"{folder} holds {', '.join(found)} but no config.json, so it is no run to go on with.")
        write_atomically(path, json.dumps(config, indent=2) + "\n")
        return
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CorruptDataError(f"{path} is not JSON ({error}). Choose another folder with --out.") from error
    if _compared(earlier) != _compared(config):
        raise UsageError(
            f"{folder} holds a run with another configuration:\n{_difference(earlier, config)}\n"
            "Choose another folder with --out, or use the same options to go on with that run."
        )


def _compared(config: Record) -> Record:
    return {name: value for name, value in config.items() if name != "out"}


def _difference(earlier: Record, now: Record) -> str:
    old, new = (json.dumps(_compared(config), indent=2, sort_keys=True).splitlines() for config in (earlier, now))
    changes = difflib.unified_diff(old, new, "that run", "this one", n=0, lineterm="")
    return "\n".join(f"  {line}" for line in changes if not line.startswith("@@"))


def _begin(folder: Path, seeds: Sequence[int]) -> Record:
    path = folder / "run.json"
    earlier = []
    if path.exists():
        with contextlib.suppress(ValueError):
            previous = json.loads(path.read_text(encoding="utf-8"))
            # We hold the lock: a run that still says "running" was killed before it could say how it ended.
            exit = "killed" if previous.get("exit") == "running" else previous.get("exit")
            attempt = {"start": previous.get("start"), "end": previous.get("end"), "exit": exit}
            earlier = [*previous.get("earlier", []), attempt]
    info = environment.describe() | {"seeds": list(seeds), "start": _now(), "end": None, "exit": "running"}
    info["earlier"] = earlier
    write_atomically(path, json.dumps(info, indent=2) + "\n")
    return info


def _end(run: Run, reason: str) -> None:
    run.info |= {"end": _now(), "exit": reason}
    write_atomically(run.folder / "run.json", json.dumps(run.info, indent=2) + "\n")


@contextlib.contextmanager
def _open_results(path: Path) -> Iterator[TextIO]:
    """Opens for appending behind the last whole line, for one process at a time."""
    with path.open("a+", encoding="utf-8") as results:
        _lock(results, path)
        whole = path.read_bytes().rfind(b"\n") + 1
        results.truncate(whole)
        yield results


def _lock(file: TextIO, path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows has no advisory locks
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UsageError(f"another process is writing to {path}. Wait for it or choose another --out.") from error


def _plain(value: Any) -> Any:
    """JSON for what `json` does not know: paths as text, arrays and NumPy scalars as numbers."""
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"a {type(value).__name__} cannot be written to a run folder: {value!r}")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
