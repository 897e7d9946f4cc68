"""Measures the attention kernels on the device that is there, against other people's attention.

Everything that is compared is timed in turn, in a random order, in one process: ratios are between times of the same
rounds. Medians come with quartiles.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from experiments import wide_vectors
from kvjax.errors import KvjaxError, UsageError

if TYPE_CHECKING:
    from experiments.bench.summary import Record
    from experiments.record import Run

Measured = Literal["decode", "prefill", "mass", "update"]
Stored = Literal["f32", "bf16", "int8", "int4", "kivi4", "int2", "kivi2"]
Rival = Literal["xla", "jax.nn", "torch", "tokamax", "paged"]


@dataclasses.dataclass(frozen=True)
class Config:
    """What to measure. Sizes default to a few that suit the device: two minutes on two idle CPU cores.

    Attributes:
      op: which ops.
      batch: rows. With any of the next three, every combination is measured.
      context: slots of a row, or tokens of a prompt.
      heads: query heads and kv heads: 32:8.
      head_dim: channels.
      format: how our keys and values are stored.
      rival: whom to compare with; what is not installed or not made for the device is left out with the reason.
      rounds: how often each is timed.
      memory: GiB that may be used; default is a quarter of the machine's, 70 % of an accelerator's.
      seed: of the order in which all take turns.
      out: the folder for results.jsonl, kernels.json and the plots; default is a new runs/<time>-bench-kernels. The
        folder of a run that was stopped goes on.
    """

    op: tuple[Measured, ...] = ("decode", "prefill", "mass", "update")
    batch: tuple[int, ...] = ()
    context: tuple[int, ...] = ()
    heads: tuple[str, ...] = ()
    head_dim: tuple[int, ...] = ()
    format: tuple[Stored, ...] = ("bf16", "int8", "int4", "kivi4", "int2")
    rival: tuple[Rival, ...] = ("xla", "jax.nn", "torch", "tokamax", "paged")
    rounds: int = 20
    memory: float | None = None
    seed: int = 0
    out: Path | None = None


def main(config: Config) -> None:
    """Measures, prints a table per size, and writes the records and plots.

    Raises:
      UsageError: sizes that cannot be, or nothing to measure.
      NumericsError: something that was measured does not compute attention.
    """
    if config.rounds < 1:
        raise UsageError(f"--rounds must be at least 1, not {config.rounds}")
    # Other libraries need room on a GPU of which JAX would take three quarters at once.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    wide_vectors.enable()
    import jax
    from rich.console import Console

    from experiments import record
    from experiments.bench import plan, report, sharded
    from experiments.bench.contest import hold, memory_limit
    from kvjax.progress import track

    sharded.one_device_per_core()
    asked = config.batch or config.context or config.heads or config.head_dim
    chosen = plan.sizes(config.batch, config.context, config.heads, config.head_dim) if asked else []
    platform = jax.default_backend()
    memory = memory_limit() if config.memory is None else int(config.memory * 2**30)
    contests = list(plan.contests(config.op, chosen, config.format, config.rival, platform))
    if not contests:
        raise UsageError("nothing to measure: choose at least one --op")
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 180)
    with record.open_run("bench-kernels", config, out=config.out, seeds=(config.seed,)) as run:
        with track("measuring", len(contests) * config.rounds) as advance:
            while contests:
                contest = contests.pop(0)  # its arrays go with it
                if run.finished(op=contest.op, case=contest.case):
                    advance(config.rounds)
                    continue
                note = f"{contest.op} {' '.join(map(str, contest.case.values()))}"
                run.append(
                    hold(
                        contest,
                        rounds=config.rounds,
                        memory=memory,
                        seed=config.seed,
                        advance=lambda note=note: advance(note=note),
                    )
                )
        for measured in run.records:
            report.show(console, measured, platform)
        write(run, jax.devices()[0].device_kind)
        console.print(f"results: {run.folder}", markup=False, soft_wrap=True)


def write(run: Run, device: str) -> None:
    """Puts kernels.json and a plot per op into the folder of a run."""
    from experiments import record
    from experiments.bench import figure, sharded, summary

    found = {
        "device": device,
        "cores": sharded.cores(),
        "versions": run.info["versions"],
        "contests": [summary.plain(one) for one in run.records],
    }
    record.write_atomically(run.folder / "kernels.json", json.dumps(found, indent=1) + "\n")
    by_op: dict[str, list[Record]] = {}
    for one in run.records:
        by_op.setdefault(one["op"], []).append(one)
    for op, measured in by_op.items():
        figure.draw([one for one in measured if one["entrants"]], run.folder / f"kernels_{op}.svg", device)


if __name__ == "__main__":
    import tyro

    from experiments.__main__ import fail

    try:
        main(tyro.cli(Config, prog="bench_kernels", description=__doc__))
    except KvjaxError as error:
        fail(str(error))
        sys.exit(error.exit_code)
