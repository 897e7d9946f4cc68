"""Counts what devices say to each other in a compiled program."""

from __future__ import annotations

import collections
import re

_NAMES = "all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute|collective-broadcast|send|recv"
_COLLECTIVE = re.compile(rf"= [^=]*? ({_NAMES})(?:-start)?\(")


def collectives(compiled) -> dict[str, int]:
    """Operations by name, in the text of `compiled` (a loop's body counts once)."""
    return dict(collections.Counter(_COLLECTIVE.findall(compiled.as_text())))
