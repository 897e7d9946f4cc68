"""Progress on stderr: a bar on a terminal, now and then a plain line anywhere else."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

LINE_EVERY_SECONDS = 5.0

#: `advance(steps=1, note="")`.
Advance = Callable[..., None]
#: `track(label, total)` is a context manager whose value is an `Advance`.
Track = Callable[[str, int], AbstractContextManager[Advance]]


@contextlib.contextmanager
def track(label: str, total: int) -> Iterator[Advance]:
    """Yields `advance(steps=1, note="")`, to be called after each piece of the `total` is done.

    `note` says in a few words what was just done. Nothing is written to stdout.
    """
    from rich.console import Console

    console = Console(stderr=True)
    shown = _bar(console, label, total) if console.is_terminal else _lines(label, total)
    with shown as advance:
        yield advance


@contextlib.contextmanager
def silent(label: str, total: int) -> Iterator[Advance]:
    """`track` that shows nothing."""
    del label, total
    yield lambda steps=1, note="": None


@contextlib.contextmanager
def _bar(console: Console, label: str, total: int) -> Iterator[Advance]:
    from rich import progress

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(bar_width=24),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TextColumn("left"),
        progress.TimeRemainingColumn(),
        progress.TextColumn("{task.fields[note]}", style="dim", markup=False),
    )
    with progress.Progress(*columns, console=console) as bar:
        task = bar.add_task(label, total=total, note="")

        def advance(steps: int = 1, note: str = "") -> None:
            bar.update(task, advance=steps, note=note)

        yield advance


@contextlib.contextmanager
def _lines(label: str, total: int) -> Iterator[Advance]:
    start = last = time.monotonic()
    done = 0

    def advance(steps: int = 1, note: str = "") -> None:
        nonlocal done, last
        done += steps
        now = time.monotonic()
        if (steps and done >= total) or now - last >= LINE_EVERY_SECONDS:
            last = now
            print(f"{label} {done}/{total} {now - start:.0f} s {note}".rstrip(), file=sys.stderr, flush=True)

    yield advance
