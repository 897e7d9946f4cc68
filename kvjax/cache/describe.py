"""Methods as JSON and back: every part by its class name and its fields, nothing that executes."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from kvjax.cache import budget, codec, fate, policy, selector
from kvjax.cache.layout import CacheDims
from kvjax.cache.method import CacheMethod
from kvjax.errors import UsageError, nearest

Part = TypeVar("Part")
_SCALARS = (bool, int, float, str)
_AXES = (budget.Budget, policy.Policy, fate.Fate, codec.Codec, selector.Selector)


def _exported() -> dict[str, type]:
    """The method, the dimensions, every concrete class of the axes, and what parts are made of."""
    members = (item for module in (budget, policy, fate, codec, selector) for item in vars(module).values())
    parts = (x for x in members if isinstance(x, type) and issubclass(x, _AXES) and not inspect.isabstract(x))
    return {cls.__name__: cls for cls in (CacheMethod, CacheDims, policy.Repetition, *parts)}


PARTS: dict[str, type] = _exported()


def register(cls: type[Part]) -> type[Part]:
    """Makes a part of your own (a frozen dataclass) one that can be saved; usable as a decorator.

    Raises:
      UsageError: another class has the name.
    """
    if PARTS.setdefault(cls.__name__, cls) is not cls:
        raise UsageError(f"a part named {cls.__name__!r} exists ({PARTS[cls.__name__].__module__}); rename the new one")
    return cls


def to_json(part: Any) -> dict[str, Any]:
    """A part (CacheMethod, CacheDims, budget, policy, fate or codec) as a JSON object.

    Raises:
      UsageError: a class that is not registered, or a field that does not hold what its annotation says.
    """
    name = type(part).__name__
    if PARTS.get(name) is not type(part):
        raise UsageError(
            f"{type(part).__module__}.{name} is not a part that kvjax knows, so a file that names it could not be read "
            f"back. Register it with kvjax.cache.describe.register."
        )
    fields = {field.name: _encode(getattr(part, field.name)) for field in dataclasses.fields(part)}
    described = {"part": name, **fields}
    if from_json(described, type(part)) != part:
        raise UsageError(f"{part!r} does not survive being written as JSON; its fields must be plain values or parts")
    return described


def from_json(described: object, kind: type[Part]) -> Part:
    """The part that `to_json` described. A field that is missing takes its default.

    Raises:
      UsageError: an unknown class or field, a class that is not a `kind`, or a value of a wrong type.
    """
    if not isinstance(described, Mapping):
        raise UsageError(f"expected a {kind.__name__}, got {_short(described)}")
    name = described.get("part")
    if not isinstance(name, str) or name not in PARTS:
        raise UsageError(f"unknown part {_short(name)}. {nearest(str(name)[:80], PARTS)}")
    cls = PARTS[name]
    if not issubclass(cls, kind):
        raise UsageError(f"expected a {kind.__name__}, got the part {name!r}")
    hints = _hints(cls)
    given = {key: value for key, value in described.items() if key != "part"}
    if unknown := sorted(given.keys() - hints.keys()):
        raise UsageError(f"{name} has no field {_short(unknown[0])}. {nearest(unknown[0][:80], hints)}")
    try:
        return cls(**{key: _decode(value, hints[key], f"{name}.{key}") for key, value in given.items()})
    except TypeError as error:  # a field without default is missing
        raise UsageError(f"{name} cannot be made from the fields {sorted(given)}: {error}") from error


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _encode(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_encode(item) for item in value]
    return value if value is None or type(value) in _SCALARS else to_json(value)


def _decode(value: Any, hint: Any, where: str) -> Any:
    """`value` as what `hint` asks for."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    for option in options:
        if isinstance(value, Mapping) and isinstance(option, type) and option not in (*_SCALARS, types.NoneType):
            return from_json(value, option)
        if get_origin(option) is tuple and isinstance(value, list):
            return tuple(_decode(item, get_args(option)[0], where) for item in value)
        if _is(value, option):
            return value
    raise UsageError(f"{where} must be {getattr(hint, '__name__', None) or hint}, got {_short(value)}")


def _is(value: Any, option: Any) -> bool:
    if get_origin(option) is Literal:
        return any(value == choice and type(value) is type(choice) for choice in get_args(option))
    if option is float:
        return type(value) in (int, float)
    return type(value) is (types.NoneType if option is None else option)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
