"""Measures what each method costs: making its cache after an exact prefill, decode steps, compile time, temporaries.

One layer of a model with random weights stands for all, because layers are alike. A decode step is the cache's own:
attention and storing a token; what projections and MLP take is the same for all methods and would only bring ratios
nearer to 1. Everything that is compared is timed in turn, in a random order, in one process.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

from experiments import wide_vectors
from kvjax.errors import KvjaxError, UsageError


@dataclasses.dataclass(frozen=True)
class Config:
    """What to measure; the defaults are what the goals are stated for, some twelve minutes on two idle CPU cores.

    Attributes:
      methods: as `kvjax methods` lists them, with options; default is every named method.
      batch: rows. context: tokens of each row's prompt.
      heads: query heads and kv heads. head_dim: channels.
      width: of the layer's input. mlp: of its MLP's hidden layer.
      layers: of the model, which some budgets depend on; the first one is measured.
      prompts: how often each cache is made. rounds: how often its decoding is timed.
      seed: of the order in which all take turns.
      out: the folder for results.jsonl, methods.json and methods.md; default is a new runs/<time>-bench-methods.
    """

    methods: tuple[str, ...] = ()
    batch: int = 4
    context: int = 4096
    heads: str = "32:8"
    head_dim: int = 128
    width: int = 4096
    mlp: int = 14336
    layers: int = 4
    prompts: int = 2
    rounds: int = 8
    seed: int = 0
    out: Path | None = None


def main(config: Config) -> None:
    """Measures, prints a table, and writes the record.

    Raises:
      UsageError: sizes that cannot be, or a name that is no method.
    """
    if min(config.prompts, config.rounds) < 1:
        raise UsageError(f"--prompts and --rounds must be at least 1, not {config.prompts} and {config.rounds}")
    wide_vectors.enable()
    from rich.console import Console

    from experiments import record
    from experiments.bench import method_cost, method_report, plan
    from experiments.bench.one_layer import Setting
    from kvjax.cache.methods import METHODS
    from kvjax.progress import track

    (size,) = plan.sizes((config.batch,), (config.context,), (config.heads,), (config.head_dim,))
    setting = Setting(
        batch=size.batch,
        context=size.context,
        query_heads=size.query_heads,
        kv_heads=size.kv_heads,
        head_dim=size.head_dim,
        width=config.width,
        mlp=config.mlp,
        layers=config.layers,
        reserve=method_cost.reserved(config.rounds),
    )
    names = config.methods or tuple(name for name in METHODS if not METHODS[name]().policy.needs_hiding)
    method_cost.check(names, setting)
    forget_programs()
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    with record.open_run("bench-methods", config, out=config.out, seeds=(config.seed,)) as run:
        if not run.records:
            with track("measuring", method_cost.turns(names, config.prompts, config.rounds)) as advance:
                measured = method_cost.measure(
                    setting,
                    names,
                    prompts=config.prompts,
                    rounds=config.rounds,
                    seed=config.seed,
                    advance=advance,
                )
            run.append(measured)
        (measured,) = run.records
        method_report.show(console, measured)
        found = {name: run.info[name] for name in ("command", "versions", "devices", "cpu_count")} | measured
        record.write_atomically(run.folder / "methods.json", json.dumps(found, indent=1) + "\n")
        record.write_atomically(run.folder / "methods.md", method_report.markdown(measured))
        console.print(f"results: {run.folder}", markup=False, soft_wrap=True)


def forget_programs() -> None:
    """Compiles everything anew, whatever earlier processes have kept."""
    import jax

    jax.config.update("jax_enable_compilation_cache", False)


if __name__ == "__main__":
    import tyro

    from experiments.__main__ import fail

    try:
        main(tyro.cli(Config, prog="bench_methods", description=__doc__))
    except KvjaxError as error:
        fail(str(error))
        sys.exit(error.exit_code)
