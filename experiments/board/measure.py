"""Measuring many methods such that one that breaks does not take the others with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator

from experiments.record import Run
from kvjax.evaluation.defaults import REFERENCE
from kvjax.evaluation.plan import Plan, Record
from kvjax.progress import Track


def measure(plan: Plan, run: Run, track: Track) -> dict[str, str]:
    """Appends to `run` what it lacks; returns the methods that failed, each with its error.

    All methods are measured together, so that they share one exact prefill. Where something breaks, each half is
    measured on its own, until what broke is alone; what was finished is not measured again, and programs that were
    compiled stay compiled.

    Raises:
      Exception: whatever the full cache raises, for everything refers to it.
    """
    return _measure(plan, [one.name for one in plan.contenders if one.name != REFERENCE], run, track)


def only(plan: Plan, names: Collection[str]) -> Plan:
    """The plan for these methods and the reference."""
    kept = {*names, REFERENCE}
    fitted = {setting: {n: m for n, m in known.items() if n in kept} for setting, known in plan.fitted.items()}
    contenders = tuple(one for one in plan.contenders if one.name in kept)
    return dataclasses.replace(plan, contenders=contenders, fitted=fitted)


def _measure(plan: Plan, names: list[str], run: Run, track: Track) -> dict[str, str]:
    error = None
    for found in _records(only(plan, names), run.records, track):
        if isinstance(found, Exception):
            error = found
        else:
            run.append(found)
    if error is None:
        return {}
    if not names:
        raise error
    if len(names) == 1:
        for _ in _unless_broken(only(plan, ()), run, track):
            pass
        return {names[0]: f"{type(error).__name__}: {error}"}
    half = len(names) // 2
    return _measure(plan, names[:half], run, track) | _measure(plan, names[half:], run, track)


def _unless_broken(plan: Plan, run: Run, track: Track) -> Iterator[Record]:
    """Measures what is left of the reference alone; its errors are raised."""
    for record in plan.run(done=run.records, track=track):
        run.append(record)
        yield record


def _records(plan: Plan, done: list[Record], track: Track) -> Iterator[Record | Exception]:
    """What the plan measures, and at the end the error that stopped it, if one did."""
    try:
        yield from plan.run(done=list(done), track=track)
    except Exception as error:
        yield error
