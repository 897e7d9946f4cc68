"""The comparison as a table for a terminal of 100 columns."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from kvjax.evaluation.figure import byte_size, number, percent, spread
from kvjax.evaluation.summary import Row, by_context, frontier, names, points

#: Columns that fit beside the method's name.
MOST_TASKS = 4


def tables(rows: Sequence[Row]) -> list[RenderableType]:
    """For each context a caption and a table with costs, mean and tasks; more tasks than fit get a second table."""
    made: list[RenderableType] = []
    for context, group in by_context(rows).items():
        tasks = names(row.scores for row in group)
        made.append(f"{context} tokens; {counted(group)}; % right ± 95 % interval; • Pareto frontier")
        made.append(_costs(group, tasks if len(tasks) <= MOST_TASKS else []))
        if len(tasks) > MOST_TASKS:
            made += [_tasks(group, tasks[i : i + 2 * MOST_TASKS]) for i in range(0, len(tasks), 2 * MOST_TASKS)]
    return made


def counted(rows: Sequence[Row]) -> str:
    """How much each method was asked: "144 questions and 48 texts per method"; the most, where methods differ."""
    counts = {"question": max(row.questions for row in rows), "text": max(row.texts for row in rows)}
    parts = [f"{count:,} {name}{'s' if count != 1 else ''}" for name, count in counts.items() if count]
    return f"{' and '.join(parts)} per method"


def _costs(rows: Sequence[Row], tasks: Sequence[str]) -> Table:
    perplexities = names(row.perplexity for row in rows)
    table = _empty()
    headers = ["ppl"] if len(perplexities) == 1 else perplexities
    for header in ("cache", "of full", "mean", *tasks, *headers, "KL", "ms/token"):
        table.add_column(header, justify="right", no_wrap=True)
    best = {point.row.method for point in frontier(points(rows))}
    for row in rows:
        name = Text(("• " if row.method in best else "  ") + row.method, "bold" if row.method in best else "")
        if row.notes:
            name.append(f" ({'; '.join(row.notes)})", "dim")
        table.add_row(
            name,
            byte_size(row.cache_bytes),
            percent(row.ratio),
            Text(spread(row.score), "bold"),
            *(spread(row.scores.get(task)) for task in tasks),
            *(number(row.perplexity.get(task)) for task in perplexities),
            "–" if row.kl is None else f"{row.kl:.3f}",
            number(row.decode_ms_per_token, 2),
        )
    return table


def _tasks(rows: Sequence[Row], tasks: Sequence[str]) -> Table:
    table = _empty()
    for task in tasks:
        table.add_column(task, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(Text("  " + row.method), *(spread(row.scores.get(task)) for task in tasks))
    return table


def _empty() -> Table:
    """A table with its method column: the only one that may fold, so that numbers are never cut."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("method", overflow="fold", min_width=12, max_width=30)
    return table
