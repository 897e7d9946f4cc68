"""The methods of a comparison: what was named, the baselines that every table has, and the budget they share."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from kvjax.cache import methods
from kvjax.cache.budget import Uniform
from kvjax.cache.layout import CacheDims
from kvjax.cache.method import CacheMethod
from kvjax.cache.plan import layer_bytes, resolve
from kvjax.engine.calibrated import Calibrated, unpack
from kvjax.engine.request import as_method
from kvjax.errors import UsageError
from kvjax.evaluation.defaults import BASELINES
from kvjax.evaluation.setting import Setting
from kvjax.models.language_model import LanguageModel

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMG])i?B", re.IGNORECASE)
_BUDGET_OPTIONS = ("tokens", "share", "bytes")


@dataclasses.dataclass(frozen=True)
class Contender:
    """A method under the name that tables show.

    Attributes:
      method: its budget is still the one that was named, or a default.
      own_budget: whether the budget was named with the method, so that a common budget does not replace it.
      calibrated: where the method comes from, if it was calibrated.
    """

    name: str
    method: CacheMethod
    own_budget: bool
    calibrated: Calibrated | None = None

    def fit(self, common: CommonBudget, model: LanguageModel, setting: Setting) -> CacheMethod:
        """The method with its budget in tokens or as a share, checked against the shapes of a setting.

        Raises:
          UsageError: the budget does not hold what the method always keeps, a codec does not fit the head dimension, or
            the method is not calibrated to this model.
        """
        method, dims = self.method, setting.dims(model)
        unpack(self.calibrated or method, model, dims)
        try:
            if self.follows(common):
                method = dataclasses.replace(method, budget=method.budget.sized_as(common.budget(dims)))
            method = resolve(method, dims)
            for layer in dims:
                method.check(layer)
        except UsageError as error:
            raise UsageError(f"method {self.name!r} at a context of {setting.context} tokens: {error}") from error
        return method

    def target_bytes(self, common: CommonBudget, dims: Sequence[CacheDims]) -> int | None:
        """Bytes that a row of this method was to take, where a common budget in bytes binds it."""
        return common.row_bytes(dims) if self.follows(common) else None

    def follows(self, common: CommonBudget) -> bool:
        """Whether a common budget binds this method: it evicts, and was named without a budget of its own."""
        return common.given and self.method.budget.evicts and not self.own_budget


@dataclasses.dataclass(frozen=True)
class CommonBudget:
    """One budget for every method that evicts and has none of its own; at most one of the fields is given.

    Attributes:
      tokens: per row. share: of the prompt. bytes: of a row's cache, everything counted.
      like: a method whose allocated bytes are the budget.
    """

    tokens: int | None = None
    share: float | None = None
    bytes: int | None = None
    like: CacheMethod | None = None

    @classmethod
    def parse(cls, text: str | None) -> CommonBudget:
        """ "256" (tokens), "25%" (of the prompt), "64KiB" (bytes of a row), or a method's name ("int4"); None is none.

        Raises:
          UsageError: none of these.
        """
        if text is None:
            return cls()
        text = text.strip()
        if text.isdigit():
            return cls(tokens=int(text))
        if size := _SIZE.fullmatch(text):
            return cls(bytes=int(float(size[1]) * 1024 ** (1 + "KMG".index(size[2].upper()))))
        if re.fullmatch(r"\d+(\.\d+)?\s*%", text):
            return cls(share=float(text[:-1]) / 100)
        try:
            return cls(like=methods.parse(text))
        except UsageError as error:
            raise UsageError(
                f"budget {text!r} is neither tokens (256), a share of the prompt (25%), bytes of a row (64KiB) nor the "
                f"name of a method: {error}"
            ) from error

    @property
    def given(self) -> bool:
        """Whether there is one."""
        return self != CommonBudget()

    def row_bytes(self, dims: Sequence[CacheDims]) -> int | None:
        """Bytes of one row's cache over all layers, or None where the budget is not in bytes."""
        if self.like is None:
            return self.bytes
        rows = [dataclasses.replace(layer, batch=1) for layer in dims]
        like = resolve(self.like, rows)
        return sum(layer_bytes(like, layer) for layer in rows)

    def budget(self, dims: Sequence[CacheDims]) -> Uniform:
        """As a method's budget, whose kind its own replaces."""
        return Uniform(tokens_kept=self.tokens, share=self.share, bytes_kept=self.row_bytes(dims))


def contenders(named: Sequence[str | CacheMethod | Calibrated]) -> list[Contender]:
    """The baselines and the named methods, in this order; a baseline that is named keeps the options it was named with.

    Raises:
      UsageError: an unknown method or option, or one name for two methods.
    """
    chosen = [_contender(method) for method in named]
    present = {contender.name.partition(":")[0] for contender in chosen}
    baselines = [_contender(name) for name in BASELINES if name not in present]
    first = [c for c in chosen if c.name.partition(":")[0] in BASELINES]
    everything = [*baselines, *first]
    everything.sort(key=lambda c: BASELINES.index(c.name.partition(":")[0]))
    everything += [c for c in chosen if c not in first]
    unique = list(dict.fromkeys(everything))
    names = [contender.name for contender in unique]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"two different methods are called {twice[0]!r}; give one of them another name")
    return unique


def _contender(named: str | CacheMethod | Calibrated) -> Contender:
    method = as_method(named)
    if isinstance(method, Calibrated):
        return Contender(method.method.name, method.method, own_budget=True, calibrated=method)
    if not isinstance(named, str):
        return Contender(method.name, method, own_budget=True)
    options = [option for part in named.split("+") for option in part.partition(":")[2].split(",")]
    own = any(option.partition("=")[0].strip() in _BUDGET_OPTIONS for option in options)
    return Contender(named, method, own)
