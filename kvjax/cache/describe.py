"""Methods as JSON and back: every part by its class name and its fields (`kvjax.describe`)."""

from __future__ import annotations

import inspect
from typing import Any, TypeVar

from kvjax import describe
from kvjax.cache import budget, codec, fate, policy, selector
from kvjax.cache.layout import CacheDims
from kvjax.cache.method import CacheMethod

Part = TypeVar("Part")
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
    return describe.register(cls, PARTS)


def to_json(part: Any) -> dict[str, Any]:
    """A part (CacheMethod, CacheDims, budget, policy, fate or codec) as a JSON object.

    Raises:
      UsageError: a class that is not registered, or a field that does not hold what its annotation says.
    """
    return describe.to_json(part, PARTS, "kvjax.cache.describe.register")


def from_json(described: object, kind: type[Part]) -> Part:
    """The part that `to_json` described. A field that is missing takes its default.

    Raises:
      UsageError: an unknown class or field, a class that is not a `kind`, or a value of a wrong type.
    """
    return describe.from_json(described, kind, PARTS)
