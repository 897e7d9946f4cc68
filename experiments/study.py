"""Reproduce the shape of the founding papers' headlines: predictions made beforehand, and what came out."""

from __future__ import annotations

import dataclasses
import functools
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from kvjax.errors import UsageError, unknown
from kvjax.evaluation import defaults

STUDIES = ("kvquant", "mikv", "keyformer", "razor", "cskv", "kvcrush", "prefixkv", "actqkv")
DOCS = Path(__file__).parent.parent / "docs"
WIDTH = 120
"""Columns of a table that goes to a file."""
TEXT_BYTES = 1 << 20
"""Of the text to calibrate on, at most."""


@dataclasses.dataclass(frozen=True)
class Size:
    """Seeds times examples are the questions, or texts, per task."""

    seeds: int
    examples: int
    samples: int


FULL = Size(seeds=5, examples=16, samples=64)
QUICK = Size(seeds=2, examples=4, samples=8)


@dataclasses.dataclass(frozen=True)
class Config:
    """Measure whether the claim of a paper holds on a model.

    Attributes:
      names: studies, or "all".
      model: a Hugging Face folder, or "reference" for the model that comes with kvjax.
      quick: a preview in minutes, with intervals too wide to conclude from.
      seeds: how many; each draws other examples.
      examples: per task and seed.
      samples: windows of text that a calibration reads.
      batch: rows at a time.
      text: a file of text to calibrate on; default is the standard library's source without what is held out.
      calibrations: a folder of files that `kvjax calibrate` made, under the names of their methods; what is not there,
        or belongs to other weights, is calibrated and kept in the run's folder.
      update: also write the sections of docs/studies.md anew.
      out: the run's folder; that of a run which was stopped goes on, study by study and cell by cell.
    """

    names: Positional[tuple[str, ...]] = ("all",)
    model: str = "reference"
    quick: bool = False
    seeds: int | None = None
    examples: int | None = None
    samples: int | None = None
    batch: int = defaults.BATCH
    text: Path | None = None
    calibrations: Path | None = None
    update: bool = False
    out: Path = Path("runs/studies")

    @property
    def size(self) -> Size:
        """What was asked for, and the preset for the rest."""
        preset = QUICK if self.quick else FULL
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(Size)}
        return dataclasses.replace(preset, **{name: value for name, value in own.items() if value is not None})


def main(config: Config) -> int:
    """Measures, prints a table per study, and writes a record and a page. Returns 1 if something could not be run."""
    from rich.console import Console

    import kvjax
    from experiments import compile_cache
    from experiments.studies import page

    chosen = select(config.names)
    if config.size.seeds < 2:
        raise UsageError(f"an interval over seeds needs at least 2 of them; got --seeds {config.size.seeds}")
    compile_cache.enable()
    model = kvjax.load(config.model)
    console, missing = Console(highlight=False), False
    if not sys.stdout.isatty():
        console = Console(highlight=False, width=max(console.width, WIDTH))
    for name in chosen:
        outcome = measured(name, model, config)
        for folder in (config.out, *((DOCS,) if config.update else ())):
            page.write(folder, name, outcome)
        console.print(page.table(name, outcome))
        for condition in outcome["conditions"]:
            for label, reason in condition["missing"].items():
                missing = True
                print(f"{name}, {condition['name']}: no {label}: {reason}", file=sys.stderr)
    console.print(f"page: {config.out / page.TEXT}", markup=False, soft_wrap=True)
    return 1 if missing else 0


def select(names: Sequence[str]) -> tuple[str, ...]:
    """The studies that are named, in the order of STUDIES. Raises UsageError for an unknown one, or none."""
    for name in names:
        if name not in (*STUDIES, "all"):
            raise unknown("study", name, [*STUDIES, "all"])
    if not names:
        raise UsageError(f"name a study, or all: {', '.join(STUDIES)}")
    return tuple(name for name in STUDIES if name in names or "all" in names)


def measured(name: str, model: Any, config: Config) -> Mapping[str, Any]:
    """Measures what is missing of a study; returns its record (see `experiments.studies.page.outcome`)."""
    from experiments.studies import measure, page
    from kvjax import progress

    study, size = page.load(name), config.size
    how = measure.How(
        size.seeds,
        size.examples,
        config.batch,
        size.samples,
        functools.cache(lambda: text(config.text)),
        config.calibrations,
        config.out / "calibrations",
        progress.track,
    )
    found = {
        condition.name: measure.run(condition, model, config.out / name / measure.slug(condition.name), how)
        for condition in study.conditions
    }
    return page.outcome(study, found, command(name, config), model.name)


def text(path: Path | None) -> str:
    """The text to calibrate on: a file's, or parts of what the reference model was trained on."""
    from experiments import calibrate
    from experiments.tokenizer import modules, training_files
    from kvjax.assets import heldout_text

    if path is not None:
        return calibrate.read(str(path))
    files = training_files(list(modules(Path(sysconfig.get_path("stdlib")))), heldout_text())
    if not files:
        raise UsageError("the standard library's source is not here to calibrate on; give a file with --text")
    parts = [source for _, source in files]
    step = max(1, sum(map(len, parts)) // TEXT_BYTES)
    return "\n".join(parts[::step])


def command(name: str, config: Config) -> str:
    """The command line that asks for this study, without the paths of one machine."""
    size = config.size
    words = ["kvjax study", name]
    words += [] if config.model == Config.model else ["--model", Path(config.model).name]
    words += ["--quick"] if config.quick else []
    for field in dataclasses.fields(Size):
        if getattr(config, field.name) is not None:
            words += [f"--{field.name}", str(getattr(size, field.name))]
    return " ".join(words)
