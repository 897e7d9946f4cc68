"""Measures a condition of a study: calibrates what needs it, sizes what has a size, and goes on where it stopped."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import kvjax
from experiments import record
from experiments.board.cells import Entrant, cells
from experiments.board.measure import make_plan, measure
from experiments.calibrate import file_name
from experiments.studies.study import Condition, Entry
from kvjax.cache.layout import CacheDims
from kvjax.cache.method import CacheMethod
from kvjax.calibration.calibrate import FINDERS
from kvjax.calibration.observe import model_dims
from kvjax.engine.calibrated import SUFFIX, Calibrated, load_calibration, weights_digest
from kvjax.engine.request import as_method
from kvjax.evaluation import defaults
from kvjax.evaluation.plan import Options, Plan, Record
from kvjax.models.language_model import LanguageModel
from kvjax.progress import Track

Contender = CacheMethod | Calibrated


@dataclasses.dataclass(frozen=True)
class How:
    """How much is measured, and what calibrations are made of.

    Attributes:
      seeds, examples, batch: as in `kvjax.compare`. samples: windows of text that a calibration reads, at most.
      text: gives the text to calibrate on; asked only where it is needed.
      given: a folder of calibrations that were made before; those of other weights are passed over.
      made: the folder of those that are made here.
      track: shows progress.
    """

    seeds: int
    examples: int
    batch: int
    samples: int
    text: Callable[[], str]
    given: Path | None
    made: Path
    track: Track


@dataclasses.dataclass(frozen=True)
class Asked:
    """What the run folder of a condition records, so that another study does not go on in it."""

    model: str
    weights: str
    condition: str
    tasks: Sequence[str]
    context: int
    query_aware: bool
    chunk: int
    seeds: int
    examples: int
    batch: int
    methods: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Measured:
    """Attributes:
    records: one per method, task and seed.
    methods: what ran, by label, in the words of `kvjax compare` or as a value.
    notes: what calibrations found, by label.
    missing: labels that could not be measured, each with the reason.
    info: on what it ran, as run.json.
    """

    records: list[Record]
    methods: Mapping[str, str]
    notes: Mapping[str, Sequence[str]]
    missing: Mapping[str, str]
    info: Mapping[str, object]


def run(condition: Condition, model: LanguageModel, folder: Path, how: How) -> Measured:
    """Measures what is not yet in the folder; `model` is the one that the condition starts from."""
    model = condition.model(model)
    options = Options(
        condition.context, how.seeds, how.examples, how.batch, query_aware=condition.query_aware, chunk=condition.chunk
    )
    (setting,) = Plan.make(model, (), condition.tasks, options).fitted
    built, missing = {}, {}
    for entry in condition.entries:
        made = build(entry, model, setting.dims(model), how)
        if isinstance(made, str):
            missing[entry.label] = made
        else:
            built[entry.label] = made
    plan, refused = make_plan(model, built, condition.tasks, options)
    able = [label for label in built if label not in refused]
    methods = {label: repr(_method(built[label])) for label in able}
    asked = Asked(
        model.name,
        weights_digest(model),
        condition.name,
        condition.tasks,
        condition.context,
        condition.query_aware,
        condition.chunk,
        how.seeds,
        how.examples,
        how.batch,
        methods,
    )
    with record.open_run("study", asked, out=folder, seeds=range(how.seeds)) as opened:
        failed = measure(plan, able, opened, how.track)
    notes = {label: one.notes for label, one in built.items() if isinstance(one, Calibrated) and one.notes}
    kept = {*able, defaults.REFERENCE}
    records = [r for r in opened.records if r["method"] in kept and r["method"] not in failed]
    return Measured(records, methods, notes, missing | refused | failed, opened.info)


def build(entry: Entry, model: LanguageModel, dims: tuple[CacheDims, ...], how: How) -> Contender | str:
    """What runs under an entry's label, calibrated and sized; or why it cannot have its size."""
    made = calibrated(entry, model, dims[0].prompt_length, how)
    if entry.size is None:
        return _labelled(made, entry.label)
    (cell,) = cells(Entrant(entry.label, {entry.label: made}), dims, [entry.size])
    return cell.reason if cell.contender is None else _labelled(cell.contender, entry.label)


def calibrated(entry: Entry, model: LanguageModel, length: int, how: How) -> Contender:
    """The entry's method, with what it must know of the model: from a file, or found now and kept in one."""
    method = as_method(entry.named)
    if isinstance(method, Calibrated):
        return method
    fitting = [finder for finder in FINDERS if finder.fits(method, model_dims(model, length))]
    if not fitting:
        return method
    name = f"{file_name(entry.label)}{SUFFIX}"
    own = how.made / f"{weights_digest(model)[:8]}-{name}"
    for path in ([how.given / name] if how.given is not None and not entry.finders else []) + [own]:
        if path.is_file() and (found := load_calibration(path)).model_digest == weights_digest(model):
            return found
    text = how.text() if any(finder.reads for finder in fitting) else None
    made = kvjax.calibrate(
        model, method, text, samples=how.samples, length=length, finders=entry.finders, progress=how.track
    )
    how.made.mkdir(parents=True, exist_ok=True)
    made.save(own)
    return made


def slug(name: str) -> str:
    """A condition's name as the name of a folder."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _labelled(made: Contender, label: str) -> Contender:
    method = dataclasses.replace(_method(made), name=label)
    return dataclasses.replace(made, method=method) if isinstance(made, Calibrated) else method


def _method(made: Contender) -> CacheMethod:
    return made.method if isinstance(made, Calibrated) else made
