"""Frozen dataclasses as JSON and back: each by its class name and its fields, nothing that executes.

Which classes a file may name is the caller's table, name -> class; a file can choose among them and no others.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from kvjax.errors import UsageError, nearest

Part = TypeVar("Part")
_SCALARS = (bool, int, float, str)


def register(cls: type[Part], parts: dict[str, type]) -> type[Part]:
    """Adds a class to a table.

    Raises:
      UsageError: another class has the name.
    """
    if parts.setdefault(cls.__name__, cls) is not cls:
        raise UsageError(f"a part named {cls.__name__!r} exists ({parts[cls.__name__].__module__}); rename the new one")
    return cls


def to_json(part: Any, parts: Mapping[str, type], registered_with: str) -> dict[str, Any]:
    """A dataclass of the table as a JSON object.

    Args:
      registered_with: the function that adds to the table, for the message.

    Raises:
      UsageError: a class that is not in the table, or a field that does not hold what its annotation says.
    """
    name = type(part).__name__
    if parts.get(name) is not type(part):
        raise UsageError(
            f"{type(part).__module__}.{name} is not a part that kvjax knows, so a file that names it could not be read "
            f"back. Register it with {registered_with}."
        )
    fields = {
        field.name: _encode(getattr(part, field.name), parts, registered_with) for field in dataclasses.fields(part)
    }
    described = {"part": name, **fields}
    if from_json(described, type(part), parts) != part:
        raise UsageError(f"{part!r} does not survive being written as JSON; its fields must be plain values or parts")
    return described


def from_json(described: object, kind: type[Part], parts: Mapping[str, type]) -> Part:
    """The dataclass that `to_json` described. A field that is missing takes its default.

    Raises:
      UsageError: an unknown class or field, a class that is not a `kind`, or a value of a wrong type.
    """
    if not isinstance(described, Mapping):
        raise UsageError(f"expected a {kind.__name__}, got {_short(described)}")
    name = described.get("part")
    if not isinstance(name, str) or name not in parts:
        raise UsageError(f"unknown part {_short(name)}. {nearest(str(name)[:80], parts)}")
    cls = parts[name]
    if not issubclass(cls, kind):
        raise UsageError(f"expected a {kind.__name__}, got the part {name!r}")
    hints = _hints(cls)
    given = {key: value for key, value in described.items() if key != "part"}
    if unknown := sorted(given.keys() - hints.keys()):
        raise UsageError(f"{name} has no field {_short(unknown[0])}. {nearest(unknown[0][:80], hints)}")
    try:
        return cls(**{key: _decode(value, hints[key], f"{name}.{key}", parts) for key, value in given.items()})
    except TypeError as error:  # a field without default is missing
        raise UsageError(f"{name} cannot be made from the fields {sorted(given)}: {error}") from error


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _encode(value: Any, parts: Mapping[str, type], registered_with: str) -> Any:
    if isinstance(value, tuple):
        return [_encode(item, parts, registered_with) for item in value]
    return value if value is None or type(value) in _SCALARS else to_json(value, parts, registered_with)


def _decode(value: Any, hint: Any, where: str, parts: Mapping[str, type]) -> Any:
    """`value` as what `hint` asks for."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    for option in options:
        if isinstance(value, Mapping) and isinstance(option, type) and option not in (*_SCALARS, types.NoneType):
            return from_json(value, option, parts)
        if get_origin(option) is tuple and isinstance(value, list):
            return tuple(_decode(item, get_args(option)[0], where, parts) for item in value)
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
