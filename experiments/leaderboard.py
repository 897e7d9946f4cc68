"""Every named method at 1/2, 1/4, 1/8 and 1/16 of the full cache's bytes: a table, a page, the Pareto fronts."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from kvjax.errors import UsageError
from kvjax.evaluation import defaults

if TYPE_CHECKING:
    from experiments.board.board import Board

FOLDER = Path(__file__).parent.parent / "docs"
PAGE = "leaderboard.html"
TEXT = "leaderboard.md"


@dataclasses.dataclass(frozen=True)
class Preset:
    """What a board measures unless told otherwise; seeds times examples are the questions per task."""

    sizes: tuple[int, ...]
    tasks: tuple[str, ...]
    seeds: int
    examples: int


FULL = Preset((2, 4, 8, 16), defaults.TASKS, seeds=4, examples=16)
QUICK = Preset((4,), ("needle", "kv"), seeds=1, examples=32)


@dataclasses.dataclass(frozen=True)
class Config:
    """Every named method at the same bytes.

    Attributes:
      model: a Hugging Face folder, or "reference" for the model that comes with kvjax.
      methods: only these, without budgets; "snapkv+int4" and the like are welcome. By default all named methods.
      calibrations: a folder of what `kvjax calibrate` made for this model; each file is one more method, of its name.
      quick: a preview in minutes: a quarter of the bytes and what is near it, two tasks, 32 questions each, no errors
        of attention outputs.
      sizes: 4 stands for a quarter of the bytes of a full bf16 cache; by default 2, 4, 8 and 16.
      tasks: as in `kvjax compare`. Default is what that compares.
      seeds: how many; each draws other examples.
      examples: per task and seed.
      context: tokens of a row; by default 1,024, or the model's limit where that is less.
      query_aware: show the question while the cache is compressed; by default it is hidden.
      batch: rows at a time.
      dtype: of tokens that a cache stores exactly.
      update: also write docs/leaderboard.md and docs/leaderboard.html.
      out: the run's folder; default is a new runs/<time>-leaderboard. The folder of a run that was stopped goes on.
    """

    model: str = "reference"
    methods: tuple[str, ...] = ()
    calibrations: Path | None = None
    quick: bool = False
    sizes: tuple[int, ...] | None = None
    tasks: tuple[str, ...] | None = None
    seeds: int | None = None
    examples: int | None = None
    context: int | None = None
    query_aware: bool = False
    batch: int = defaults.BATCH
    dtype: Literal["bfloat16", "float16", "float32"] = defaults.DTYPE
    update: bool = False
    out: Path | None = None

    @property
    def preset(self) -> Preset:
        """The preset with what was asked for in its place."""
        preset = QUICK if self.quick else FULL
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(Preset)}
        return dataclasses.replace(preset, **{name: value for name, value in own.items() if value is not None})


def main(config: Config) -> int:
    """Measures, prints the table and where the page is. Returns 1 if a method failed."""
    from experiments.board import markdown, page

    board, folder = measured(config)
    text, html = markdown.markdown(board), page.html(board)
    for place in (folder, *((FOLDER,) if config.update else ())):
        (place / TEXT).write_text(text, encoding="utf-8")
        (place / PAGE).write_text(html, encoding="utf-8")
    print(text)
    print(f"page: {folder / PAGE}")
    for setting, error in board.failures.items():
        print(f"failed: {setting}: {error}", file=sys.stderr)
    return 1 if board.failures else 0


def measured(config: Config) -> tuple[Board, Path]:
    """Measures into a run folder what is not yet in it; returns the board of what is in it, and the folder."""
    import kvjax
    from experiments import compile_cache, record
    from experiments.board import cells
    from experiments.board.board import Board
    from experiments.board.measure import make_plan, measure
    from kvjax import progress
    from kvjax.evaluation.plan import Options, Plan
    from kvjax.evaluation.summary import summarise

    preset = config.preset
    if not preset.sizes or min(preset.sizes) < 1:
        raise UsageError(f"--sizes are whole numbers of at least 1, such as 4 for a quarter; got {preset.sizes}")
    sizes = [1 / size for size in sorted(set(preset.sizes))]
    compile_cache.enable()
    model = kvjax.load(config.model)
    options = Options(
        config.context,
        preset.seeds,
        preset.examples,
        config.batch,
        None,
        config.query_aware,
        config.dtype,
        attention_errors=not config.quick,
    )
    (setting,) = Plan.make(model, (), preset.tasks, options).fitted
    if not setting.has_keys(model):
        raise UsageError(
            f"model {model.name!r} keeps no keys and values, so methods have nothing to do here; `kvjax compare` takes "
            "it as one of the models --beside another"
        )
    entrants, missing = cells.entrants(config.methods, config.calibrations, model)
    board = [cell for one in entrants for cell in cells.cells(one, setting.dims(model), sizes)]
    if config.quick:
        board = [cell for cell in board if cell.size is not None]
    runnable = {cell.setting: cell.contender for cell in board if cell.contender is not None}
    plan, refused = make_plan(model, runnable, preset.tasks, options)
    asked = dataclasses.replace(config, update=False)  # a finished run can be written into docs/ later
    with record.open_run("leaderboard", asked, out=config.out, seeds=range(preset.seeds)) as run:
        failures = refused | measure(plan, [name for name in runnable if name not in refused], run, progress.track)
    rows = [row for row in summarise(run.records) if row.method in runnable or row.method == defaults.REFERENCE]
    asked_for = plan.config | {"command": command(config), "quick": config.quick}
    return Board(board, rows, failures, missing, sizes, asked_for, run.info), run.folder


def command(config: Config) -> str:
    """The command line that asks for this, without the paths of one machine."""
    words = ["kvjax leaderboard"]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value == field.default or field.name in ("update", "out"):
            continue
        values = value if isinstance(value, tuple) else () if value is True else (value,)
        words += [f"--{field.name.replace('_', '-')}", *(Path(v).name if _is_path(v) else str(v) for v in values)]
    return " ".join(words)


def _is_path(value: object) -> bool:
    return isinstance(value, Path) or (isinstance(value, str) and Path(value).is_absolute())
