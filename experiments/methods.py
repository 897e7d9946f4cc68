"""Lists every named method: the paper, what it chooses on each axis, its options, and the bits that it stores."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvjax.errors import UsageError

if TYPE_CHECKING:
    from kvjax.cache.layout import CacheDims
    from kvjax.cache.method import CacheMethod


@dataclasses.dataclass(frozen=True)
class Config:
    """What the listing shows.

    Attributes:
      head_dim: the head dimension that bits per element are given for; scales are shared by that many channels.
      kv_heads: kv heads of a layer, which some formats store together.
    """

    head_dim: int = 128
    kv_heads: int = 8


@dataclasses.dataclass(frozen=True)
class Entry:
    """What one named method is. `axes` has a line per choice that differs from keeping everything exactly."""

    name: str
    summary: str
    paper: str
    axes: tuple[tuple[str, str], ...]
    options: str
    bits: tuple[float, float]


def main(config: Config) -> None:
    """Prints an entry for each method, and how they are composed."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from kvjax.cache.layout import CacheDims
    from kvjax.cache.methods import METHODS

    if config.head_dim < 1 or config.kv_heads < 1:
        raise UsageError(f"--head-dim and --kv-heads are at least 1; got {config.head_dim} and {config.kv_heads}")
    dims = CacheDims(1, config.kv_heads, config.kv_heads, config.head_dim, 1, 1)
    entries = [describe(name, build, dims) for name, build in METHODS.items()]
    console = Console(highlight=False)
    for entry in entries:
        table = Table.grid(padding=(0, 1))
        table.add_column(min_width=9, style="dim")
        table.add_column()
        table.add_row("", Text(entry.summary))
        table.add_row("paper", Text(entry.paper))
        for axis, choice in entry.axes:
            table.add_row(axis, Text(choice))
        keys, values = entry.bits
        table.add_row("bits", f"{keys:g} keys, {values:g} values, per element of the body, scales counted")
        if entry.options:
            table.add_row("options", Text(entry.options))
        console.print(Text(entry.name, "bold"))
        console.print(table)
        console.print()
    console.print(Text("compose them: snapkv:tokens=256+int4   random:share=25%   h2o:bytes=64KiB"))


def describe(name: str, build: Callable[..., CacheMethod], dims: CacheDims) -> Entry:
    """What a named method is, from its docstring, its signature and the value that it makes."""
    method = build()
    summary, paper = read_docstring(inspect.getdoc(build) or "")
    here = method.for_layer(dataclasses.replace(dims, selective=method.policy.needs_hiding))
    bits = (here.keys.bits_per_element(dims), here.values.bits_per_element(dims))
    options = ", ".join(f"{p.name}={p.default}" for p in inspect.signature(build).parameters.values())
    return Entry(name, summary, paper, tuple(axes(method)), options.replace("=None", "=…"), bits)


def axes(method: CacheMethod) -> list[tuple[str, str]]:
    """What a method chooses: the fields that differ from keeping everything exactly, and the policy if it evicts."""
    chosen = []
    for field in dataclasses.fields(method):
        value = getattr(method, field.name)
        decides = field.name == "policy" and method.budget.evicts
        if field.name != "name" and (value != field.default or decides):
            chosen.append((field.name, spelled(value)))
    return chosen


def spelled(value: Any) -> str:
    """A part as it would be written, without what is None: `Integer(bits=4, axis=token, group=32, symmetric=False)`."""
    if not dataclasses.is_dataclass(value):
        return str(value)
    fields = [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    return f"{type(value).__name__}({', '.join(f'{name}={spelled(one)}' for name, one in fields if one is not None)})"


def read_docstring(text: str) -> tuple[str, str]:
    """The first paragraph, and the sentence behind "Paper:", each on one line."""
    summary, *rest = re.split(r"\n\s*\n", text)
    paper = next((part.removeprefix("Paper:") for part in rest if part.startswith("Paper:")), "")
    # A sentence ends at a full stop that is neither an abbreviation ("et al.,") nor part of an arXiv number.
    sentence = re.split(r"(?<=[\w)])\.\s+(?=[A-Z])|\.$", " ".join(paper.split()), maxsplit=1)[0]
    return " ".join(summary.split()), sentence
