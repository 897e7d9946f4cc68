"""A comparison as one self-contained page: finding, Pareto plot, table, tasks, layers, and how it was made.

The page needs no script and asks the network for nothing; every text from outside is escaped.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from kvjax.evaluation import plot
from kvjax.evaluation.figure import byte_size, interval, number, percent
from kvjax.evaluation.finding import findings
from kvjax.evaluation.summary import Estimate, Record, Row, by_context, frontier, names, points, summarise
from kvjax.evaluation.table import counted


@dataclasses.dataclass(frozen=True)
class Section:
    """What the page shows of one context length. `layers` is the largest layer's bytes, the scale of all panels."""

    context: str
    rows: Sequence[Row]
    tasks: Sequence[str]
    perplexities: Sequence[str]
    best: frozenset[str]
    layers: float
    wide: Markup | None
    narrow: Markup | None

    @property
    def asked(self) -> str:
        return counted(self.rows)

    @property
    def seeds(self) -> int:
        return max(row.seeds for row in self.rows)


def write(folder: Path, records: Iterable[Record], *, config: Mapping[str, Any], run: Mapping[str, Any]) -> Path:
    """Writes report.html, and pareto.svg where there are scores, into a run folder; returns the page's path."""
    rows = summarise(records)
    page = folder / "report.html"
    page.write_text(html(rows, config=config, run=run), encoding="utf-8")
    for group in list(by_context(rows).values())[-1:]:
        if scored := points(group):
            (folder / "pareto.svg").write_text(plot.pareto(scored, standalone=True), encoding="utf-8")
    return page


def html(rows: Sequence[Row], *, config: Mapping[str, Any], run: Mapping[str, Any]) -> str:
    """The page.

    Args:
      rows: at least one, from `summarise`.
      config: the resolved configuration; `model` and `query_aware` are read where present, all of it is shown.
      run: command, versions, devices, git, start and end as in run.json; what is missing is left out.
    """
    sections = [_section(context, group) for context, group in by_context(rows).items()]
    return _template().render(
        title=_title(sections, config),
        style=Markup(plot.style_sheet() + _source("report.css")),
        findings=[_joined(sentence) for sentence in findings(rows, config)],
        protocol=_protocol(config),
        sections=sections,
        facts=_facts(run),
        config=json.dumps(config, indent=2, ensure_ascii=False, default=str),
    )


def _section(context: int, rows: Sequence[Row]) -> Section:
    scored = points(rows)
    return Section(
        context=f"{context:,}",
        rows=rows,
        tasks=names(row.scores for row in rows),
        perplexities=names(row.perplexity for row in rows),
        best=frozenset(point.row.method for point in frontier(scored)),
        layers=max((size for row in rows for size in row.layer_bytes), default=0),
        wide=Markup(plot.pareto(scored, width=1040, height=460)) if scored else None,
        narrow=Markup(plot.pareto(scored, width=352, height=300 + 12 * len(scored))) if scored else None,
    )


def _title(sections: Sequence[Section], config: Mapping[str, Any]) -> str:
    count = len({row.method for section in sections for row in section.rows})
    contexts = " and ".join(section.context for section in sections)
    model = str(config.get("model", "a model"))
    return f"{count} KV-cache methods, model {model}, {contexts} tokens of context"


def _protocol(config: Mapping[str, Any]) -> str:
    if "query_aware" not in config:
        return ""
    if config["query_aware"]:
        return "The methods saw the question while they compressed the cache (query-aware)."
    return "The question was hidden while the cache was compressed (query-agnostic): a cache that serves any question."


def _facts(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and values for the foot of the page, of what the run recorded."""
    devices = ", ".join(f"{d['count']} x {d['platform']} ({d['kind']})" for d in run.get("devices") or ())
    versions = ", ".join(f"{name} {version}" for name, version in (run.get("versions") or {}).items())
    git = run.get("git") or {}
    facts = {
        "command": run.get("command"),
        "started": run.get("start"),
        "ended": run.get("end"),
        "seeds": ", ".join(map(str, run.get("seeds") or ())),
        "devices": devices,
        "system": run.get("system"),
        "python": run.get("python"),
        "versions": versions,
        "revision": f"{git['commit']}{', with uncommitted changes' if git.get('dirty') else ''}" if git else None,
    }
    return [(name, str(value)) for name, value in facts.items() if value]


def _score(score: Estimate | None) -> Markup:
    """A table cell: the mean, and its limits in small print."""
    if score is None:
        return Markup("–")
    return Markup(f"{100 * score.mean:.0f}<small>{100 * score.low:.0f}–{100 * score.high:.0f}</small>")


def _breakable(name: str) -> Markup:
    """A name that may break behind its punctuation rather than inside a word."""
    return Markup(re.sub(r"([:+,=_-])", r"\1<wbr>", str(escape(name))))


def _joined(sentence: str) -> str:
    """The sentence with "97 % (95–98)" kept on one line."""
    return sentence.replace(" %", "\u00a0%").replace("% (", "%\u00a0(").replace("–", "\u2060–\u2060")


def _source(name: str) -> str:
    return (plot.FOLDER / name).read_text(encoding="utf-8")


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {
        "bytes": byte_size,
        "percent": percent,
        "number": number,
        "score": _score,
        "interval": interval,
        "breakable": _breakable,
    }
    return environment.from_string(_source("report.html.j2"))
