"""Compiles every TPU and GPU kernel for accelerators that need not be there, and writes or checks a table of it.

Needs libtpu or the CUDA plugin, which `make test-hardware` installs into .venv-hardware:

    .venv-hardware/bin/python -m experiments.compile_kernels --op decode_attention --target v5e
    .venv-hardware/bin/python -m experiments.compile_kernels --check
"""

from __future__ import annotations

import dataclasses
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence

from experiments.hardware_table import golden, measure, report
from experiments.hardware_table.cell import Cell, cells
from experiments.hardware_table.golden import Golden, Versions
from experiments.hardware_table.measure import Row
from experiments.hardware_table.target import BY_NAME
from kvjax.errors import KvjaxError, UsageError


@dataclasses.dataclass(frozen=True)
class Config:
    """What to compile and what to do with it.

    Attributes:
      op: only these ops.
      spec: only these workloads.
      target: only these accelerators; by default all that the installed compilers know.
      check: compare with the committed table; exit code 1 where they differ.
      update: put what comes out into the committed table and docs/hardware.md.
      workers: compilations side by side.
      limit: seconds for one compilation.
    """

    op: tuple[str, ...] = ()
    spec: tuple[str, ...] = ()
    target: tuple[str, ...] = ()
    check: bool = False
    update: bool = False
    workers: int = 2
    limit: float = 300.0


def main(config: Config) -> int:
    """Compiles, prints, and checks or updates. Returns 1 if a kernel does not compile or the check finds something.

    Raises:
      UsageError: a name is unknown, nothing is left to compile, or versions differ from those of the table.
      MissingExtraError: what compiles for a named target is not installed.
    """
    if config.check and config.update:
        raise UsageError("choose --check or --update: one compares with the committed table, the other replaces it")
    chosen = list(_installed(cells(config.op, config.spec, config.target), named=bool(config.target)))
    if not chosen:
        raise UsageError("nothing to compile: no op has such a spec and a kernel for such a target")
    versions = {name: BY_NAME[target].toolchain.versions() for name, target in _toolchains(chosen).items()}
    committed = golden.load()
    if config.check:
        require_same_versions(committed, versions)
    rows = list(_progress(chosen, config))
    print()
    print(report.markdown(Golden(versions, {golden.key(row): row for row in rows})))
    failed = [f"{' '.join(golden.key(row))}: {row['reason']}" for row in rows if row["status"] == "failed"]
    problems = [*failed, *(golden.differences(committed, rows) if config.check else ())]
    if config.update:
        _update(committed, versions, rows, config)
    for problem in problems:
        print(problem)
    print(
        f"{len(rows)} compiled, {len(problems)} to look at" if problems else f"{len(rows)} compiled, all as they should"
    )
    return 1 if problems else 0


def require_same_versions(committed: Golden, versions: Versions) -> None:
    """Raises UsageError unless the table was made by these versions; others make other code, with nothing wrong."""
    for name, here in versions.items():
        there = committed.versions.get(name, {})
        if there != here:
            raise UsageError(
                f"the committed table was compiled by {golden.described(there)}; here is {golden.described(here)}. "
                "Other versions make other code, so there is nothing to compare: install what "
                "constraints-hardware.txt pins, or compile all of it anew with --update."
            )


def _installed(chosen: Iterable[Cell], named: bool) -> Iterator[Cell]:
    """The cells whose compiler is here; a missing one is an error if its target was named."""
    left_out: set[str] = set()
    for cell in chosen:
        toolchain = BY_NAME[cell.target].toolchain
        if named:
            toolchain.versions()
        if toolchain.installed:
            yield cell
        elif cell.target not in left_out:
            left_out.add(cell.target)
            print(f"{cell.target} is left out: {' and '.join(toolchain.packages)} not installed here", file=sys.stderr)


def _toolchains(chosen: Sequence[Cell]) -> dict[str, str]:
    """Toolchain -> one target that it compiles for."""
    return {BY_NAME[cell.target].toolchain.name: cell.target for cell in chosen}


def _progress(chosen: Sequence[Cell], config: Config) -> Iterator[Row]:
    """The rows, each announced when it is there."""
    for number, row in enumerate(measure.rows(chosen, config.workers, config.limit), start=1):
        said = f": {row['reason']}" if "reason" in row else ""
        print(
            f"[{number}/{len(chosen)}] {' '.join(golden.key(row))} {row['status']}{said}", file=sys.stderr, flush=True
        )
        yield row


def _update(committed: Golden, versions: Versions, rows: Sequence[Row], config: Config) -> None:
    """Writes both forms of the table. What no longer exists leaves it when everything of a target was compiled."""
    measured = {row["target"] for row in rows}
    everything = not (config.op or config.spec)
    stale = [k for k in committed.rows if everything and k[2] in measured]
    updated = committed.merged(versions, rows, stale)
    updated.save()
    report.PATH.write_text(report.insert(report.PATH.read_text("utf-8"), report.markdown(updated)), "utf-8")


if __name__ == "__main__":
    import tyro

    from experiments.__main__ import fail

    # Ends as an interrupt does: what is being compiled finishes and its folders go, nothing more is started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        sys.exit(main(tyro.cli(Config, prog="compile_kernels", description=__doc__)))
    except KvjaxError as error:
        fail(str(error))
        sys.exit(error.exit_code)
