"""One row of the table: everything that is compiled for a cell, and what came out."""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from experiments.hardware_table import process
from experiments.hardware_table.cell import Cell, workload
from experiments.hardware_table.program import RESULT, Program
from experiments.hardware_table.target import BY_NAME

Row = dict[str, Any]

#: Lengths of the two static schedules whose difference is a block; what comes before and after a loop cancels.
SHORT, LONG = 8, 24


def rows(cells: Iterable[Cell], workers: int, limit: float) -> Iterator[Row]:
    """The rows of cells, in their order.

    Args:
      cells: what to compile.
      workers: compilations side by side.
      limit: seconds for one compilation.
    """
    with ThreadPoolExecutor(workers) as pool:
        yield from pool.map(lambda cell: row(cell, limit), cells)


def row(cell: Cell, limit: float) -> Row:
    """One row: `status`, and if it is 'ok' bytes, code and, for a TPU with a cycle model, the static schedule."""
    names = {"op": cell.op, "spec": cell.spec, "target": cell.target}
    found = compiled(Program(cell), limit)
    if found["status"] == "ok" and BY_NAME[cell.target].core and workload(cell).static_schedule:
        found["schedule"] = _schedule(cell, limit)
    return {**names, **found}


def _schedule(cell: Cell, limit: float) -> Row:
    """Of a block `packed_bytes`, `slots`, `bundles`, `copy_bundles` and `cycles`, or a `reason` for what lacks.

    The estimate of cycles kills the compiler on some kernels, after it has said all else.
    """
    fetching = compiled(Program(cell, SHORT, copies=True), limit)
    if fetching["status"] != "ok":
        return {"reason": fetching["reason"]}
    short = compiled(Program(cell, SHORT), limit)
    if "bundles" not in short:
        return {"reason": short["reason"]}
    block = {
        "packed_bytes": fetching["packed_bytes"],
        "slots": fetching["slots"],
        "bundles": short["bundles"],
        "copy_bundles": max(0, fetching["bundles"] - short["bundles"]),
    }
    long = compiled(Program(cell, LONG), limit) if "cycles" in short else short
    if "cycles" not in long:
        return {**block, "reason": long.get("reason", "the compiler estimates no cycles")}
    return {**block, "cycles": round((long["cycles"] - short["cycles"]) / (LONG - SHORT))}


def compiled(program: Program, limit: float) -> Row:
    """What became of one program, compiled in a process and a folder of its own, both gone afterwards."""
    toolchain = BY_NAME[program.cell.target].toolchain
    # Only a schedule without copies is worth an estimate: copies are charged one after the other.
    cycles = program.steps is not None and not program.copies
    command = [sys.executable, "-m", "experiments.hardware_table.program", program.dumps()]
    with tempfile.TemporaryDirectory(prefix="kvjax-compile-") as name:
        folder = Path(name)
        ended = process.run(command, folder, toolchain.variables(folder, cycles), limit)
        if ended.code == 0:
            found = json.loads((folder / RESULT).read_text())
            return found | toolchain.code(folder) if found["status"] == "ok" else found
        failed = {"status": "failed", "reason": ended.reason}
        with contextlib.suppress(ValueError):  # what is there may be incomplete
            failed |= toolchain.code(folder) if cycles else {}
        return failed
