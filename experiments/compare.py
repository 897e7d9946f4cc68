"""Compare cache methods on a model: what each one costs and what it loses."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from kvjax.evaluation import defaults

if TYPE_CHECKING:
    from kvjax.evaluation.compare import Comparison


@dataclasses.dataclass(frozen=True)
class Config:
    """Compare cache methods: what each one costs and what it loses.

    Attributes:
      model: a Hugging Face folder, or "reference" for the model that comes with kvjax.
      methods: names as `kvjax methods` lists them, with options and combinations: "snapkv:tokens=256+int4"; or files
        that `kvjax calibrate` made. The rows full, random and streaming_llm are always added.
      tasks: needle, multikey, multivalue, multiquery, kv, kv3, vt, copy, perplexity-prefill, perplexity-stream, or
        perplexity for both protocols.
      context: tokens of a row, question and answer included; several compare at several lengths. Longer than the
        model's limit is an error.
      budget: for every method that evicts and has no budget in its name: 256 (tokens), 25% (of the prompt), 64KiB (of
        a row's cache), or the name of a method whose bytes are the budget ("int4").
      query_aware: show the question while the cache is compressed; by default it is hidden.
      seeds: how many; each draws other examples.
      examples: per task and seed.
      batch: rows at a time.
      dtype: of tokens that a cache stores exactly.
      chunk: tokens per step of methods that read a prompt in pieces.
      attention_errors: measure them too, which takes one more compiled program per method.
      beside: other models (folders) of the same tokenizer, whose rows "name/method" stand beside those of the model;
        all sizes are shares of its full cache.
      out: the run's folder; default is a new runs/<time>-compare. The folder of a run that was stopped goes on.
    """

    model: str = "reference"
    methods: tuple[str, ...] = defaults.METHODS
    tasks: tuple[str, ...] = defaults.TASKS
    context: tuple[int, ...] = (defaults.CONTEXT,)
    budget: str | None = None
    query_aware: bool = False
    seeds: int = defaults.SEEDS
    examples: int = defaults.EXAMPLES
    batch: int = defaults.BATCH
    dtype: Literal["bfloat16", "float16", "float32"] = defaults.DTYPE
    chunk: int = defaults.CHUNK
    attention_errors: bool = True
    beside: tuple[str, ...] = ()
    out: Path | None = None


def main(config: Config) -> None:
    """Runs the comparison; prints the table, what it shows, and where the report is."""
    show(*run("compare", config, config.model, config.methods, config.tasks, options=config))


def run(
    name: str, config: Any, model: str, methods: Sequence[str], tasks: Sequence[str], *, options: Config
) -> tuple[Comparison, Path]:
    """Measures into a run folder what is not yet in it; returns everything that is in it, and its report.

    Args:
      config: what the run folder records, with a field `out`.
      options: a `Config` of which the context, budget, seeds, examples and so on are taken.
    """
    import kvjax
    from experiments import compile_cache, record
    from kvjax import progress
    from kvjax.evaluation import beside
    from kvjax.evaluation.compare import Comparison
    from kvjax.evaluation.plan import Options

    compile_cache.enable()
    fields = [field.name for field in dataclasses.fields(Options)]
    models = [kvjax.load(one) for one in (model, *options.beside)]
    planned = beside.plans(models, methods, tasks, Options(**{name: getattr(options, name) for name in fields}))
    with record.open_run(name, config, out=config.out, seeds=range(options.seeds)) as run:
        for one in planned:
            for result in one.run(done=run.records, track=progress.track):
                run.append(result)
        comparison = Comparison(run.records, beside.config_of(planned))
        page = comparison.write_report(run.folder, run.info)
    return comparison, page


def show(comparison: Comparison, page: Path) -> None:
    """Prints the table, what it shows, and the path of the report on stdout."""
    from rich.console import Console

    console = Console(highlight=False)
    if not sys.stdout.isatty():
        console = Console(highlight=False, width=max(console.width, 100))
    console.print(comparison)
    for sentence in comparison.findings:
        console.print(f"\n{sentence}", markup=False)
    console.print(f"\nreport: {page}", markup=False, soft_wrap=True)
