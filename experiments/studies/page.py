"""The outcome of studies as a record (JSON), as a table for a terminal and as docs/studies.md.

The page is made from the records and from the docstrings of the studies' modules, and from nothing else.
"""

from __future__ import annotations

import importlib
import inspect
import json
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from experiments.record import write_atomically
from experiments.studies import claim as claims
from experiments.studies.claim import Verdict
from experiments.studies.measure import Measured
from experiments.studies.study import Claim, Condition, Study
from experiments.study import STUDIES
from kvjax.errors import UsageError
from kvjax.evaluation.defaults import REFERENCE
from kvjax.evaluation.figure import number, percent, spread
from kvjax.evaluation.summary import Row, summarise

TEXT, DATA = "studies.md", "studies.json"
VERDICTS: tuple[Verdict, ...] = ("held", "did not hold", "cannot be shown here")
VERSIONS = ("kvjax", "jax", "numpy")
Outcome = Mapping[str, Any]

INTRODUCTION = """\
# Studies

What the founding papers report, measured on the model that comes with kvjax: 1.1 million parameters, 3 layers, 8 query
and 2 kv heads of 32. It is no large model, so the question is whether the *shape* of a headline comes back: which of
two methods wins. Each prediction was written down before it was measured. A claim *held* where the whole 95 % interval
of the difference lies on the predicted side, *did not hold* where it lies on the other, and *cannot be shown here*
where it lies on both. Conditions with something planted compute what the model computes, as long as the cache is full.
`kvjax study all` makes this page; each module of `experiments/studies` is one section."""


def load(name: str) -> Study:
    """The study of a module of `experiments.studies`."""
    return _module(name).STUDY


def outcome(study: Study, found: Mapping[str, Measured], command: str, model: str) -> Outcome:
    """All that is known of a study as JSON: title, model, command, info, conditions with their rows, and claims."""
    first = next(iter(found.values()))
    return {
        "title": study.title,
        "model": model,
        "command": command,
        "info": {key: first.info.get(key) for key in ("start", "versions")},
        "conditions": [_condition(condition, found[condition.name]) for condition in study.conditions],
        "claims": [_claim(claim, found[claim.condition]) for claim in study.claims],
    }


def write(folder: Path, name: str, made: Outcome) -> None:
    """Replaces the study's part of the record and of the page in a folder; those of others stay."""
    folder.mkdir(parents=True, exist_ok=True)
    outcomes = read(folder / DATA) | {name: made}
    ordered = {known: outcomes[known] for known in STUDIES if known in outcomes}
    write_atomically(folder / DATA, json.dumps(ordered, indent=1, ensure_ascii=False) + "\n")
    write_atomically(folder / TEXT, markdown(ordered))


def read(path: Path) -> dict[str, Outcome]:
    """The outcomes of a record, by study; none where there is no record."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def table(name: str, made: Outcome) -> Table:
    """A study's claims for a terminal."""
    shown = Table(title=f"{name}: {made['title']}", title_justify="left", show_lines=True)
    for header in ("claim", "predicted", "paper", "here, 95 % interval", "verdict"):
        shown.add_column(header, overflow="fold")
    for one in made["claims"]:
        shown.add_row(one["says"], one["predicted"], one["paper"], one["ours"], one["verdict"])
    return shown


def markdown(outcomes: Mapping[str, Outcome]) -> str:
    """The page."""
    lines = [INTRODUCTION, "", *_overview(outcomes)]
    for name, made in outcomes.items():
        lines += ["", *_section(name, made)]
    return "\n".join(lines) + "\n"


def _overview(outcomes: Mapping[str, Outcome]) -> Iterator[str]:
    def counted(made: Outcome) -> list[str]:
        verdicts = [one["verdict"] for one in made["claims"]]
        return [str(verdicts.count(verdict)) for verdict in VERDICTS]

    rows = [[f"[{made['title']}](#{name})", *counted(made)] for name, made in outcomes.items()]
    yield from _table(["study", *VERDICTS], rows, left=1)


def _section(name: str, made: Outcome) -> Iterator[str]:
    doc = inspect.getdoc(_module(name)) or ""
    yield from (f"## {name}", "", f"*{made['title']}.*", "", doc, "")
    yield from _table(
        ["claim", "predicted", "paper", "here, 95 % interval", "verdict"],
        [[c["says"], c["predicted"], c["paper"], c["ours"], f"**{c['verdict']}**"] for c in made["claims"]],
        left=5,
    )
    for condition in made["conditions"]:
        yield from ("", f"**{condition['name']}.** {condition['asked']}", "")
        measured = condition["measured"]
        rows = [[f"`{row['label']}`", *(row[name] for name in measured)] for row in condition["rows"]]
        yield from _table(["method", *measured], rows, left=1)
        notes = [f"- `{label}`: {'; '.join(said)}." for label, said in condition["notes"].items()]
        notes += [f"- no `{label}`: {reason}" for label, reason in condition["missing"].items()]
        yield from ("", *notes) if notes else ()
    info = made["info"]
    versions = ", ".join(f"{name} {info['versions'][name]}" for name in VERSIONS if name in info["versions"])
    yield from ("", f"`{made['command']}`; model {made['model']}; {str(info['start'])[:10]}; {versions}.")


def _condition(condition: Condition, found: Measured) -> dict[str, Any]:
    rows = summarise(found.records)
    order = {REFERENCE: -1} | {entry.label: index for index, entry in enumerate(condition.entries)}
    rows.sort(key=lambda row: order[row.method])
    cells = [_cells(row, [r for r in found.records if r["method"] == row.method]) for row in rows]
    hidden = "seen while the cache is compressed" if condition.query_aware else "hidden while the cache is compressed"
    whole = [r for r in found.records if r["method"] == REFERENCE and r["task"] == condition.tasks[0]]
    seeds, count = len({record["seed"] for record in whole}), sum(record["examples"] for record in whole)
    asked = f"{condition.context} tokens, {count} examples per task, {seeds} seeds"
    asked += f"; questions are {hidden}." if rows[0].scores else "."
    return {
        "name": condition.name,
        "asked": f"{condition.why} {asked}".strip(),
        "measured": list(cells[0]) if cells else [],
        "rows": [{"label": row.method, **cell} for row, cell in zip(rows, cells, strict=True)],
        "notes": {label: list(notes) for label, notes in found.notes.items()},
        "missing": dict(found.missing),
        "methods": dict(found.methods),
    }


def _cells(row: Row, records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What a table says of a method: its bytes, its scores, its perplexity (as claims have it) and its divergence."""
    cells = {"of full": percent(row.ratio)}
    cells |= {f"{task}, %": spread(score) for task, score in row.scores.items()}
    for task in row.perplexity:
        logarithms = claims.by_seed([r for r in records if r["task"] == task], "perplexity")
        cells[task] = f"{math.exp(statistics.fmean(logarithms)):.2f}"
    return cells | {"KL, nats": number(row.kl)}


def _claim(claim: Claim, found: Measured) -> dict[str, Any]:
    said = {"says": claim.says, "condition": claim.condition, "measure": claim.measure, "paper": claim.paper}
    said |= {"method": claim.method, "against": claim.against, "predicted": claims.prediction(claim)}
    try:
        finding = claims.find(claim, found.records)
    except UsageError as error:
        return said | {"ours": f"not measured: {error}", "verdict": "cannot be shown here"}
    apart = finding.difference
    return said | {
        "ours": claims.spelled(claim, finding),
        "values": [finding.method, finding.against],
        "difference": [apart.mean, apart.low, apart.high],
        "verdict": finding.verdict,
    }


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield "|" + " --- |" * left + " ---: |" * (len(head) - left)
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', '/') for cell in row)} |"


def _module(name: str) -> Any:
    return importlib.import_module(f"experiments.studies.{name}")
