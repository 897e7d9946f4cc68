"""The little language that names and composes methods: `name[:option=value[,option=value]][+name...]`."""

from __future__ import annotations

import dataclasses
import inspect
import re

from kvjax.cache.codec import Identity
from kvjax.cache.layout import ceil_to
from kvjax.cache.method import CacheMethod
from kvjax.cache.methods.named import METHODS
from kvjax.cache.selector import ReadAll
from kvjax.errors import UsageError, unknown


def parse(spec: str) -> CacheMethod:
    """A method from its name: `name[:option=value[,option=value]][+name...]`.

    Values are numbers, shares ("25%"), sizes ("64KiB"), or words.

    Raises:
      UsageError: an unknown name or option, or parts that cannot be combined; says which and what is known.
    """
    parts = [_build(part.strip()) for part in spec.split("+")]
    method = parts[0]
    for other in parts[1:]:
        method = combine(method, other)
    return dataclasses.replace(method, name=spec)


def combine(first: CacheMethod, second: CacheMethod) -> CacheMethod:
    """One method that evicts like one of the two and stores like the other.

    Raises:
      UsageError: both evict, both code, or both select.
    """
    name = f"{first.name}+{second.name}"
    if first.budget.evicts and second.budget.evicts:
        raise UsageError(f"{name!r} names two ways to evict; a method has one budget and one policy")
    coded = [m for m in (first, second) if (m.keys, m.values) != (Identity(), Identity())]
    if len(coded) == 2:
        raise UsageError(f"{name!r} names two ways to store tokens; a method has one codec for keys and one for values")
    base = second if second.budget.evicts else first
    other = first if base is second else second
    codec = coded[0] if coded else base
    selecting = [m for m in (first, second) if m.selector != ReadAll()]
    if len(selecting) == 2:
        raise UsageError(f"{name!r} names two ways to choose what is read; a method has one selector")
    combined = {
        "selector": (selecting or [base])[0].selector,
        "keys": codec.keys,
        "values": codec.values,
        "rotate": codec.rotate,
        "flush": codec.flush,
        "sinks": max(base.sinks, other.sinks),
        "name": name,
    }
    if not base.budget.evicts:
        combined["recent"] = max(base.recent, other.recent)
    if base.every is not None:
        combined["every"] = ceil_to(base.every, codec.block)
    return dataclasses.replace(base, **combined)


def _build(part: str) -> CacheMethod:
    name, _, options = part.partition(":")
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    build = METHODS[name]
    known = inspect.signature(build).parameters
    given: dict[str, int | float | bool | str] = {}
    for option in filter(None, options.split(",")):
        key, equals, value = (x.strip() for x in option.partition("="))
        if key not in known or not equals:
            example = f"{name}:{next(iter(known))}=…" if known else name
            raise UsageError(
                f"method {name!r} has no option {key!r} (options: {', '.join(known) or 'none'}; written {example})"
            )
        given[key] = _value(value)
    try:
        return build(**given)
    except TypeError as error:
        raise UsageError(f"method {part!r}: {error}") from error


_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMG])i?B", re.IGNORECASE)


def _value(text: str) -> int | float | bool | str:
    if size := _SIZE.fullmatch(text):
        return int(float(size[1]) * 1024 ** (1 + "KMG".index(size[2].upper())))
    if share := re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", text):
        return float(share[1]) / 100
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
