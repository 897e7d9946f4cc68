"""The demo: the model that comes with kvjax, eight cache methods at equal bytes, four tasks; a table and a report."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from experiments import compare
from kvjax.evaluation import defaults

KEEPER = "int4"
EVICTING = ("h2o", "snapkv")
METHODS = (*EVICTING, "kivi-2", "int8", KEEPER)


@dataclasses.dataclass(frozen=True)
class Config:
    """Eight cache methods on the shipped model, those that evict at the bytes of int4; the question is hidden.

    Attributes:
      examples: per task and seed.
      out: the run's folder; default is a new runs/<time>-demo. The folder of a run that was stopped goes on.
    """

    examples: int = 16
    out: Path | None = None


def main(config: Config) -> None:
    """Prints the table, what it shows, and where the report is."""
    options = compare.Config(budget=KEEPER, examples=config.examples)
    compare.show(*compare.run("demo", config, "reference", METHODS, defaults.TASKS, options=options))
