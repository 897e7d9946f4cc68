"""Measuring many methods such that one that breaks does not take the others with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence

from experiments.record import Run
from kvjax.cache.method import CacheMethod
from kvjax.engine.calibrated import Calibrated
from kvjax.errors import UsageError
from kvjax.evaluation.contender import CommonBudget
from kvjax.evaluation.contender import contenders as contender_list
from kvjax.evaluation.defaults import REFERENCE
from kvjax.evaluation.plan import Options, Plan, Record
from kvjax.models.language_model import LanguageModel
from kvjax.progress import Track


def measure(plan: Plan, names: Sequence[str], run: Run, track: Track) -> dict[str, str]:
    """Appends to `run` what it lacks of these methods and the reference; returns those that failed, with the error.

    Methods are measured together, so that they share exact prefills (`Plan`). Where something breaks, each half is
    measured on its own, until what broke is alone; what was finished is not measured again.

    Raises:
      Exception: whatever the full cache raises, for everything refers to it.
    """
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
        measure(plan, (), run, track)  # whose error it is, if the reference breaks as well
        return {names[0]: f"{type(error).__name__}: {error}"}
    half = len(names) // 2
    return measure(plan, names[:half], run, track) | measure(plan, names[half:], run, track)


def make_plan(
    model: LanguageModel, contenders: Mapping[str, CacheMethod | Calibrated], tasks: Sequence[str], options: Options
) -> tuple[Plan, dict[str, str]]:
    """The plan for the contenders that can run and the reference, and why each other one cannot.

    Raises:
      UsageError: a task or an option is wrong, whatever the contenders.
    """
    (setting,) = Plan.make(model, (), tasks, options).fitted
    refused = {}
    for name, value in contenders.items():
        contender = next(one for one in contender_list([value]) if one.name == name)
        try:
            contender.fit(CommonBudget(), model, setting)
        except UsageError as error:
            refused[name] = str(error)
    able = [value for name, value in contenders.items() if name not in refused]
    return only(Plan.make(model, able, tasks, options), contenders), refused


def only(plan: Plan, names: Collection[str]) -> Plan:
    """The plan for these methods and the reference."""
    kept = {*names, REFERENCE}
    fitted = {setting: {n: m for n, m in known.items() if n in kept} for setting, known in plan.fitted.items()}
    contenders = tuple(one for one in plan.contenders if one.name in kept)
    return dataclasses.replace(plan, contenders=contenders, fitted=fitted)


def _records(plan: Plan, done: list[Record], track: Track) -> Iterator[Record | Exception]:
    """What the plan measures, and at the end the error that stopped it, if one did."""
    try:
        yield from plan.run(done=list(done), track=track)
    except Exception as error:
        yield error
