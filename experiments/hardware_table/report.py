"""The table for people: Markdown, made from the data and nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from experiments.hardware_table.golden import Golden, described
from experiments.hardware_table.measure import Row
from experiments.hardware_table.target import BY_NAME, TARGETS, Target

PATH = Path(__file__).resolve().parent.parent.parent / "docs" / "hardware.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"


def insert(text: str, table: str) -> str:
    """A document with the table between its two marks replaced."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the document lacks the marks {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{table}\n{END}{after}"


def markdown(golden: Golden) -> str:
    """Everything that is known about the kernels, op by op."""
    lines = [f"Compiled by {described(versions)}.  " for versions in golden.versions.values()]
    ops = dict.fromkeys(op for op, _, _ in sorted(golden.rows))
    for op in ops:
        rows = [golden.rows[k] for k in sorted(golden.rows) if k[0] == op]
        lines += ["", f"### {op}", "", *_bytes(rows), "", *_schedules(rows), "", *_graphics(rows), "", *_refusals(rows)]
    return _squeezed(lines)


def ratio(row: Row) -> float | None:
    """Cycles of a block, copies issued, over the cycles that HBM needs for its bytes; below 1 memory is the limit."""
    schedule, core = row.get("schedule", {}), BY_NAME[row["target"]].core
    if core is None or "cycles" not in schedule:
        return None
    return (schedule["cycles"] + schedule["copy_bundles"]) / core.cycles(schedule["packed_bytes"])


def _bytes(rows: Sequence[Row]) -> Iterator[str]:
    """A line per spec: what it reads and keeps, and on each target bundles and spills."""
    present = {row["target"] for row in rows}
    targets = [target for target in TARGETS if target.name in present]
    yield from _head(
        ["spec", "arguments", "padding", "temporaries", "largest intermediate", "moved", *(t.name for t in targets)]
    )
    for spec in dict.fromkeys(row["spec"] for row in rows):
        by_target = {row["target"]: row for row in rows if row["spec"] == spec}
        fine = [row for row in by_target.values() if row["status"] == "ok"]
        numbers = [
            _range({row["target"]: row["array_bytes"] for row in fine}),
            _range({row["target"]: row["argument_bytes"] - row["array_bytes"] for row in fine}),
            _range({row["target"]: row["temporary_bytes"] for row in fine}),
            _range({row["target"]: row["intermediate_bytes"] for row in fine}),
            _range({row["target"]: row["moved_bytes"] for row in fine}),
        ]
        yield _line([spec, *numbers, *(_code(by_target.get(target.name)) for target in targets)])


def _code(row: Row | None) -> str:
    if row is None:
        return ""
    if row["status"] != "ok":
        return row["status"]
    if "bundles" in row:
        return f"{row['bundles']:,} / {row['spills'] + row['fills']:,}"
    return "ok"


def _schedules(rows: Sequence[Row]) -> Iterator[str]:
    """A line per spec and TPU with a cycle model: compute against memory."""
    scheduled = [row for row in rows if "bundles" in row.get("schedule", {})]
    if not scheduled:
        return
    yield from _head(["spec", "target", "slots", "bytes", "bundles", "cycles", "copies", "HBM cycles", "ratio"])
    order = {target.name: index for index, target in enumerate(TARGETS)}
    for row in sorted(scheduled, key=lambda row: (row["spec"], order[row["target"]])):
        schedule, core = row["schedule"], BY_NAME[row["target"]].core
        assert core is not None
        names = ("slots", "packed_bytes", "bundles", "cycles", "copy_bundles")
        counts = [f"{schedule[name]:,}" if name in schedule else "" for name in names]
        share = ratio(row)
        needed = f"{core.cycles(schedule['packed_bytes']):,.0f}"
        yield _line([row["spec"], row["target"], *counts, needed, "" if share is None else f"{share:.2f}"])


def _graphics(rows: Sequence[Row]) -> Iterator[str]:
    """A line per spec on a GPU."""
    measured = [row for row in rows if "registers" in row]
    if measured:
        names = ("registers", "spill_bytes", "bulk_copies", "barriers")
        yield from _head(["spec", "target", *(name.replace("_", " ") for name in names)])
        for row in measured:
            yield _line([row["spec"], row["target"], *(str(row[name]) for name in names)])


def _refusals(rows: Sequence[Row]) -> Iterator[str]:
    """Every reason why something is not in the tables above, with what it holds for."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        name = f"{row['spec']} {row['target']}"
        if row["status"] != "ok":
            reasons.setdefault((row["status"], row["reason"]), []).append(name)
        elif "reason" in row.get("schedule", {}):
            kind = "no cycles" if "bundles" in row["schedule"] else "no schedule"
            reasons.setdefault((kind, row["schedule"]["reason"]), []).append(name)
    for (status, reason), names in reasons.items():
        yield f"- {status}: {reason} ({', '.join(names)})"


def _head(names: Sequence[str]) -> Iterator[str]:
    yield _line(names)
    yield _line(["---"] + ["---:"] * (len(names) - 1))


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _range(values: Mapping[str, int]) -> str:
    """One number, or the smallest and the largest, with its target, where targets differ."""
    if len(set(values.values())) < 2:
        return "".join(f"{value:,}" for value in list(values.values())[:1])
    most = max(values, key=lambda target: values[target])
    return f"{min(values.values()):,} to {values[most]:,} ({most})"


def _squeezed(lines: Iterable[str]) -> str:
    """Lines with no two empty ones in a row."""
    kept: list[str] = []
    for line in lines:
        if line or (kept and kept[-1]):
            kept.append(line)
    return "\n".join(kept).strip() + "\n"


def clocks(targets: Sequence[Target] = TARGETS) -> str:
    """The numbers that turn bytes into cycles, as a table."""
    rows = [target for target in targets if target.core]
    lines = [*_head(["target", "clock", "HBM bandwidth per core", "source"])]
    for target in rows:
        assert target.core is not None
        core = target.core
        lines.append(
            _line([target.name, f"{core.gigahertz:g} GHz", f"{core.gigabytes_per_second:g} GB/s", core.source])
        )
    return "\n".join(lines)
