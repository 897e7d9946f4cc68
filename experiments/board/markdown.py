"""A board as Markdown, made from the measurements and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from experiments.board.board import KINDS, Board
from experiments.board.cells import Cell, size_name
from kvjax.evaluation.defaults import REFERENCE
from kvjax.evaluation.figure import interval, number, percent, spread
from kvjax.evaluation.summary import Row, same_memory
from kvjax.evaluation.table import counted


def markdown(board: Board) -> str:
    """The page for people."""
    lines = [
        f"# Leaderboard{' (quick)' if board.quick else ''}",
        "",
        *_head(board),
        "",
        *(_scores(board) if board.tasks else ()),
        "## Distance from the full cache",
        "",
        "Divergence (KL) of next-token distributions, nats per token, mean over all tasks and texts.",
        "",
        *_matrix(board, lambda row: number(row.kl, 2)),
        "",
    ]
    for task in board.texts:
        lines += [
            f"## {task[0].upper()}{task[1:]}",
            "",
            f"The full cache: {number(board.full.perplexity.get(task))}.",
            "",
        ]
        lines += [*_matrix(board, lambda row, task=task: number(row.perplexity.get(task))), ""]
    if board.tasks:
        lines += ["## Pareto frontier", "", "What no other setting beats in score and bytes.", "", *_front(board), ""]
    lines += [*_absent(board)]
    return "\n".join(lines).rstrip() + "\n"


def headline(board: Board) -> list[str]:
    """For each size the best method that fits it, and its score."""
    best = [(size, board.best(size)) for size in board.sizes]
    return [
        f"In {size_name(size)} of the full cache's memory: {board.settings[setting].name}, {interval(score)}."
        for size, setting in best
        if setting is not None and (score := board.measured[setting].score) is not None
    ]


def made_by(board: Board) -> list[tuple[str, str]]:
    """How the board was made, as names and values."""
    info, config = board.info, board.config
    devices = ", ".join(f"{d['count']} x {d['platform']} ({d['kind']})" for d in info.get("devices") or ())
    git = info.get("git") or {}
    facts = {
        "command": config["command"],
        "date": str(info.get("start") or "")[:10],
        "model": config["model"],
        "context": f"{board.full.context:,} tokens",
        "tasks": ", ".join(config["tasks"]),
        "per method": f"{counted(board.rows)}, {config['seeds']} seed{'s' if config['seeds'] != 1 else ''}",
        "question": "shown while the cache is compressed"
        if config["query_aware"]
        else "hidden while the cache is compressed",
        "rows": f"{config['batch']} at a time; what a method has learnt, like factors, is counted once for all of them",
        "stored exactly as": config["dtype"],
        "machine": f"{info.get('system')}, {info.get('cpu_count')} CPUs, {devices}",
        "versions": ", ".join(f"{name} {version}" for name, version in (info.get("versions") or {}).items()),
        "revision": f"{git['commit'][:12]}{', with uncommitted changes' if git.get('dirty') else ''}" if git else "",
    }
    return [(name, str(value)) for name, value in facts.items() if value]


def _head(board: Board) -> Iterator[str]:
    settings = len(board.settings)
    note = " **A quick board**: few questions, wide intervals. Run the full one before you conclude."
    methods = len({cell.name for cell in board.settings.values()})
    yield f"{methods} methods in {settings} settings, beside the full cache.{note if board.quick else ''}"
    yield ""
    yield from _table(["", ""], made_by(board), right=False)
    if said := headline(board):
        yield ""
        yield from (f"- {sentence}" for sentence in said)


def _scores(board: Board) -> Iterator[str]:
    yield from ("## Score", "")
    yield f"Mean over {_listed(board.tasks)}: percent of questions answered right, ± the longer side of the 95 %"
    yield f"interval; the full cache: {spread(board.full.score)}. In brackets what a cache takes, where that is not the"
    yield "size of its column; bold is the best that fits its column; – is a size that the method cannot reach."
    yield ""
    yield from _matrix(board, lambda row: spread(row.score), marked=True)
    yield ""


def _matrix(board: Board, shown: Callable[[Row], str], marked: bool = False) -> Iterator[str]:
    """Methods by sizes, a block for each kind; with a last column for settings of other bytes if there are any."""
    own = any(cell.size is None for cell in board.cells)
    best = {board.best(size) for size in board.sizes} if marked else set()

    def text(cells: Sequence[Cell]) -> str:
        return ", ".join(filter(None, (_cell(board, cell, shown, best) for cell in cells)))

    rows = []
    for kind in KINDS:
        for name in board.methods(kind):
            columns = [text(board.at(name, size)) for size in board.sizes]
            rows.append([name, kind, *columns, *([text(board.at(name, None))] if own else [])])
    yield from _table(["method", "kind", *map(size_name, board.sizes), *(["other"] if own else [])], rows)


def _cell(board: Board, cell: Cell, shown: Callable[[Row], str], best: set[str | None]) -> str:
    if cell.setting in board.failures:
        return "failed"
    if cell.setting not in board.measured:
        return "–"
    row = board.measured[cell.setting]
    text = shown(row)
    text = f"**{text}**" if cell.setting in best else text
    exact = cell.size is not None and same_memory(row.ratio, cell.size)
    return text if exact else f"{text} ({percent(row.ratio)})"


def _front(board: Board) -> Iterator[str]:
    rows = []
    for row, score in board.front():
        kind = "" if row.method == REFERENCE else board.settings[row.method].kind
        rows.append([f"`{row.method}`", kind, percent(row.ratio), interval(score)])
    yield from _table(["setting", "kind", "of full", "score"], rows)


def _absent(board: Board) -> Iterator[str]:
    """What is not in the tables, and why."""
    if board.failures:
        yield from ("## Failed", "", "These broke; no number of theirs is above.", "")
        yield from (f"- `{setting}`: {error}" for setting, error in board.failures.items())
        yield ""
    if board.missing:
        yield from ("## Not calibrated", "")
        yield f"{_listed(board.missing)} must be calibrated to a model first:"
        yield "`kvjax calibrate --method NAME --out DIR/NAME.safetensors`, then `--calibrations DIR`."
        yield ""
    reasons: dict[str, list[str]] = {}
    for cell in board.cells:
        if cell.contender is None:
            reasons.setdefault(cell.reason, []).append(f"{cell.name} at {size_name(cell.size)}")
    if reasons:
        yield from ("## Out of reach", "")
        yield from (f"- {', '.join(cells)}: {reason}" for reason, cells in reasons.items())


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], right: bool = True) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield "|" + " --- |" * min(2, len(head)) + (" ---: |" if right else " --- |") * (len(head) - 2)
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', '/') for cell in row)} |"


def _listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))
