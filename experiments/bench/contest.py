"""A contest: several entrants compute the same workload, and one record says how each of them did."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from experiments.bench.entrant import Entrant, Program
from experiments.bench.race import Laps, race
from kvjax.errors import NumericsError

Record = dict[str, Any]

LARGEST_ERROR = 0.05
"""An entrant that is further from the definition computes something else. Rivals round to bfloat16 on the way."""

LEAST_SECONDS = 2e-3
"""Of one timing; starting a computation takes some hundredths of that."""


@dataclasses.dataclass(frozen=True)
class Contest:
    """One workload.

    Attributes:
      op: the op that is measured.
      case: the workload's size, for titles; JSON.
      entrants: with different names.
      bases: the entrants that all others are compared with.
    """

    op: str
    case: dict[str, Any]
    entrants: tuple[Entrant, ...]
    bases: tuple[str, ...]


def hold(contest: Contest, *, rounds: int, memory: int, seed: int, advance: Callable[[], None]) -> Record:
    """Compiles, checks and times the entrants; returns the record of the contest, which is JSON.

    Args:
      rounds: how often each entrant is timed.
      memory: bytes for everybody's arrays and the largest temporaries; entrants that need more are left out.
      seed: of the order in which they take turns.
      advance: called after each round.

    Raises:
      NumericsError: the answer of an entrant is wrong.
    """
    left_out: dict[str, str] = {}
    ready = [(e, p) for e in contest.entrants if (p := _prepared(e, left_out)) is not None]
    ready = _fitting(ready, memory, left_out)
    errors: dict[str, float | None] = {}
    for entrant, program in list(ready):
        try:
            errors[entrant.name] = _error(entrant, program)
        except NumericsError:
            raise
        except Exception as error:  # a rival that compiles and then does not run is no reason to stop
            _leave(entrant, error, left_out)
            ready.remove((entrant, program))
    laps = race(
        {entrant.name: _runner(entrant, program) for entrant, program in ready},
        rounds,
        seed=seed,
        least=LEAST_SECONDS,
        advance=advance,
    )
    entrants = {e.name: _record(e, program, laps[e.name], errors[e.name]) for e, program in ready}
    return {
        "op": contest.op,
        "case": contest.case,
        "bases": list(contest.bases),
        "entrants": entrants,
        "left_out": left_out,
    }


def _prepared(entrant: Entrant, left_out: dict[str, str]) -> Program | None:
    try:
        return entrant.prepare(entrant.data)
    except Exception as error:  # not installed, not for this device, or does not compile: all are answers here
        return _leave(entrant, error, left_out)


def _leave(entrant: Entrant, error: Exception, left_out: dict[str, str]) -> None:
    """Notes why an entrant does not take part; the project's own has to."""
    if entrant.own:
        raise error
    first = next(iter(str(error).strip().splitlines()), "")
    left_out[entrant.name] = f"{type(error).__name__}: {first}"[:300]


def _fitting(
    ready: Sequence[tuple[Entrant, Program]], memory: int, left_out: dict[str, str]
) -> list[tuple[Entrant, Program]]:
    """As many as fit; those that read most leave first."""
    staying = list(ready)
    while staying and (needed := _needed(staying)) > memory:
        largest = max(staying, key=lambda one: _own_bytes(*one))
        staying.remove(largest)
        left_out[largest[0].name] = f"{needed / 2**30:.1f} GiB are needed, {memory / 2**30:.1f} may be used"
    return staying


def _needed(ready: Sequence[tuple[Entrant, Program]]) -> int:
    shared = {id(entrant.data): entrant.data.nbytes for entrant, _ in ready}
    return sum(shared.values()) + max(program.temporaries or 0 for _, program in ready)


def _own_bytes(entrant: Entrant, program: Program) -> int:
    return entrant.data.nbytes + (program.temporaries or 0)


def _error(entrant: Entrant, program: Program) -> float | None:
    """Runs once; the largest error of the answer, relative to its largest magnitude."""
    result = program.wait(program.start(entrant.data.arrays))
    expected = entrant.data.right_answer
    if entrant.answer is None or expected is None:
        return None
    answer = np.asarray(entrant.answer(result), np.float64)
    error = float(np.abs(answer - expected).max() / np.abs(expected).max())
    if not error <= LARGEST_ERROR:
        raise NumericsError(f"{entrant.name} is wrong by {error:.2g} of the largest value, so it measures another op")
    return error


def _runner(entrant: Entrant, program: Program) -> Callable[[int], None]:
    arrays = entrant.data.arrays

    def run(calls: int) -> None:
        result = None
        for _ in range(calls):
            result = program.start(arrays)
        program.wait(result)

    return run


def _record(entrant: Entrant, program: Program, laps: Laps, error: float | None) -> Record:
    return {
        "moves": entrant.moves,
        "temporaries": program.temporaries,
        "naive": entrant.naive,
        "error": error,
        "calls": laps.calls,
        "seconds": list(laps.seconds),
        "processor_seconds": list(laps.processor),
    }


def memory_limit() -> int:
    """Bytes that a contest may use here: 70 % of an accelerator's memory, a quarter of a machine's."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
    statistics = device.memory_stats() or {}
    return int(statistics.get("bytes_limit", 16 * 2**30) * 0.7)
