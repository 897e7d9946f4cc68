"""What the costs of methods come to: ratios, and whether goals are met, as a table for a terminal and in Markdown."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator
from typing import TYPE_CHECKING

from experiments.bench.method_cost import COMPILED, FULL, Record
from experiments.bench.report import milliseconds
from experiments.bench.summary import Spread, ratio

if TYPE_CHECKING:
    from rich.console import Console

MET, MISSED = "✓", "✗"


@dataclasses.dataclass(frozen=True)
class Measured:
    """A ratio and the largest that it should be; None where there is no goal."""

    value: Spread
    goal: float | None

    @property
    def met(self) -> bool | None:
        return None if self.goal is None else self.value.median <= self.goal


@dataclasses.dataclass(frozen=True)
class Cost:
    """One method.

    Attributes:
      making, step: seconds of making the cache, and of a decode step.
      share: of the prefill's time that making the cache takes. of_attention: of the time of its attention alone.
      steps: a decode step in steps of the full cache.
      compiling: seconds. compiled: in those of the full cache, the prefill's included in both.
      processor: share, steps and compiled by the time that this process computed, which depends less on others.
      temporary: the largest array that a step makes, of what the stored keys take as float32.
      cache: bytes of the cache, of the full one's.
    """

    name: str
    making: float
    share: Measured
    of_attention: float
    step: float
    steps: Measured
    compiling: float
    compiled: Measured
    processor: tuple[float, float, float]
    temporary: Measured
    cache: float


def costs(record: Record) -> list[Cost]:
    """Of every method of a record."""
    full = record["methods"][FULL]

    def whole(method: Record, time: str) -> float:
        return record["compile_prefill"][time] + sum(one[time] for one in method["compile"])

    def compiled(method: Record, time: str) -> float:
        return whole(method, time) / whole(full, time)

    def cost(name: str, method: Record) -> Cost:
        share = ratio(method["compress"], record["prefill"])
        goals, largest = method["goals"], method["largest"] / method["dequantised"]
        return Cost(
            name,
            making=statistics.median(method["compress"]["seconds"]),
            share=Measured(share, goals["share"]),
            of_attention=ratio(method["compress"], record["attention"]).median,
            step=statistics.median(method["decode"]["seconds"]),
            steps=Measured(ratio(method["decode"], full["decode"]), goals["step"]),
            compiling=whole(method, "seconds"),
            compiled=Measured(Spread.of([compiled(method, "seconds")]), COMPILED),
            processor=(
                ratio(method["compress"], record["prefill"], "processor_seconds").median,
                ratio(method["decode"], full["decode"], "processor_seconds").median,
                compiled(method, "processor"),
            ),
            temporary=Measured(Spread.of([largest]), 1.0),
            cache=method["cache"] / full["cache"],
        )

    return [cost(name, method) for name, method in record["methods"].items()]


def columns(found: list[Cost]) -> Iterator[tuple[str, list[str]]]:
    """(heading, a cell per method)."""
    yield "method", [one.name for one in found]
    yield "cache of full", [f"{100 * one.cache:.0f} %" for one in found]
    yield "make, ms", [milliseconds(one.making) for one in found]
    yield "of prefill", [_percent(one.share) for one in found]
    yield "processor", [f"{100 * one.processor[0]:.1f} %" for one in found]
    yield "of attention", [f"{100 * one.of_attention:.0f} %" for one in found]
    yield "step, ms", [milliseconds(one.step) for one in found]
    yield "x full", [_times(one.steps, quartiles=True) for one in found]
    yield "processor", [f"{one.processor[1]:.2f}" for one in found]
    yield "compile, s", [f"{one.compiling:.1f}" for one in found]
    yield "x full", [_times(one.compiled) for one in found]
    yield "processor", [f"{one.processor[2]:.2f}" for one in found]
    yield "largest temporary", [_percent(one.temporary) for one in found]


def show(console: Console, record: Record) -> None:
    """Prints the table, and who was left out and why."""
    from rich.table import Table

    table = Table(title=title(record), title_justify="left", box=None, padding=(0, 1), header_style="bold")
    shown = list(columns(costs(record)))
    for heading, _ in shown:
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for cells in zip(*(cells for _, cells in shown), strict=True):
        table.add_row(*cells)
    console.print(table)
    for line in notes(record):
        console.print(line, style="dim", markup=False)


def markdown(record: Record) -> str:
    """The same as a Markdown table."""
    shown = list(columns(costs(record)))
    lines = [
        [heading for heading, _ in shown],
        ["---", *["---:"] * (len(shown) - 1)],
        *zip(*(cells for _, cells in shown), strict=True),
    ]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return "\n\n".join([title(record), table, *notes(record)]) + "\n"


def title(record: Record) -> str:
    """The sizes, and what a prefill costs."""
    size = record["setting"]
    heads, rows = f"{size['query_heads']}:{size['kv_heads']}", size["batch"]
    prefill, attention = (statistics.median(record[name]["seconds"]) for name in ("prefill", "attention"))
    return (
        f"One of {size['layers']} layers, {rows} rows of {size['context']} tokens, heads {heads}, head_dim "
        f"{size['head_dim']}, width {size['width']}, MLP {size['mlp']}. An exact prefill of the layer takes "
        f"{prefill:.2f} s, {attention:.2f} s of it attention (one row timed, times {rows}); compiling it, "
        f"{record['compile_prefill']['seconds']:.1f} s."
    )


def notes(record: Record) -> list[str]:
    """Which goals are missed by whom, and who was left out."""
    found = costs(record)
    goals = {"share of the prefill": "share", "decode step": "steps", "compile time": "compiled"}
    goals["largest temporary"] = "temporary"
    lines = []
    for name, field in goals.items():
        judged = [(one.name, getattr(one, field).met) for one in found if getattr(one, field).met is not None]
        missed = ", ".join(name for name, met in judged if not met)
        lines.append(
            f"{name}: {sum(met for _, met in judged)} of {len(judged)} reach the goal"
            + f"; not {missed}" * bool(missed)
        )
    return lines + [f"{name} is left out: {reason}." for name, reason in record["left_out"].items()]


def _mark(one: Measured) -> str:
    return "" if one.met is None else f" {MET if one.met else MISSED}"


def _percent(one: Measured) -> str:
    return f"{100 * one.value.median:.1f} %{_mark(one)}"


def _times(one: Measured, quartiles: bool = False) -> str:
    around = f" ({one.value.low:.2f}–{one.value.high:.2f})" if quartiles else ""
    return f"{one.value.median:.2f}{around}{_mark(one)}"
