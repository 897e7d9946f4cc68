"""The committed table as data: what was compiled, by which versions, and how a new one may differ from it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from experiments.hardware_table.measure import Row
from experiments.hardware_table.target import BY_NAME
from kvjax.errors import CorruptDataError, UsageError

PATH = Path(__file__).with_name("golden.json")

#: Numbers of a row that must be the same, and those that may differ by `TOLERANCE`.
EXACT = (
    "status",
    "array_bytes",
    "argument_bytes",
    "temporary_bytes",
    "alias_bytes",
    "moved_bytes",
    "spill_bytes",
    "barriers",
)
EXACT_SCHEDULE = ("packed_bytes", "slots")
CLOSE = ("bundles", "registers")
CLOSE_SCHEDULE = ("bundles", "cycles")
TOLERANCE = 0.05

Key = tuple[str, str, str]
Versions = dict[str, dict[str, str]]


@dataclasses.dataclass(frozen=True)
class Golden:
    """A table.

    Attributes:
      versions: toolchain -> package -> version of what compiled its rows.
      rows: by (op, spec, target).
    """

    versions: Versions
    rows: dict[Key, Row]

    def merged(self, versions: Versions, rows: Iterable[Row], stale: Iterable[Key] = ()) -> Golden:
        """This table with other rows put in, `stale` ones taken out, and their toolchains' versions.

        Raises:
          UsageError: rows that stay were compiled by other versions than those that come in.
        """
        new = {key(row): row for row in rows}
        kept = {k: row for k, row in self.rows.items() if k not in new and k not in set(stale)}
        for k in kept:
            name = BY_NAME[k[2]].toolchain.name
            if name in versions and self.versions.get(name) != versions[name]:
                raise UsageError(
                    f"the row {' '.join(k)} was compiled by {described(self.versions.get(name, {}))}, but here is "
                    f"{described(versions[name])}: one table is made by one version, so update all of its rows"
                )
        return Golden(self.versions | versions, kept | new)

    def save(self, path: Path = PATH) -> None:
        """One line per row, in the order of their keys."""
        lines = [json.dumps(self.rows[k]) for k in sorted(self.rows)]
        body = ",\n  ".join(lines)
        path.write_text(f'{{"versions": {json.dumps(self.versions)},\n "rows": [\n  {body}\n ]}}\n', encoding="utf-8")


def key(row: Row) -> Key:
    """What identifies a row."""
    return row["op"], row["spec"], row["target"]


def load(path: Path = PATH) -> Golden:
    """The committed table; an empty one if there is none yet.

    Raises:
      CorruptDataError: the file is not such a table.
    """
    if not path.exists():
        return Golden({}, {})
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return Golden(found["versions"], {key(row): row for row in found["rows"]})
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptDataError(f"{path.name} is not a table of compiled kernels ({error}); restore it") from error


def described(versions: dict[str, str]) -> str:
    """Versions in a line."""
    return ", ".join(f"{name} {version}" for name, version in versions.items()) or "nothing"


def differences(golden: Golden, rows: Sequence[Row]) -> Iterator[str]:
    """A sentence for everything in which rows differ from the committed ones of the same keys."""
    for row in rows:
        name = " ".join(key(row))
        old = golden.rows.get(key(row))
        if old is None:
            yield f"{name}: not in the committed table"
            continue
        yield from _exact(name, old, row, EXACT)
        yield from _close(name, old, row, CLOSE)
        schedules = old.get("schedule", {}), row.get("schedule", {})
        yield from _exact(f"{name} schedule", *schedules, EXACT_SCHEDULE)
        yield from _close(f"{name} schedule", *schedules, CLOSE_SCHEDULE)


def _exact(name: str, old: Row, new: Row, fields: Sequence[str]) -> Iterator[str]:
    for field in fields:
        if old.get(field) != new.get(field):
            why = f" ({new['reason']})" if "reason" in new else ""
            yield f"{name}: {field} was {old.get(field)}, is {new.get(field)}{why}"


def _close(name: str, old: Row, new: Row, fields: Sequence[str]) -> Iterator[str]:
    for field in fields:
        before, after = old.get(field), new.get(field)
        if (before is None) != (after is None):
            yield f"{name}: {field} was {before}, is {after}"
        elif before is not None and after is not None and abs(after - before) > TOLERANCE * before:
            yield f"{name}: {field} was {before}, is {after} ({after / max(before, 1) - 1:+.1%})"
