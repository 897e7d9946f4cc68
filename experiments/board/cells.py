"""Which setting of a method stands for it at a size: 1/2, 1/4, … of the bytes of a full bf16 cache."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from kvjax.cache import methods
from kvjax.cache.budget import HeadTable, LayerTable, Sized
from kvjax.cache.layout import CacheDims
from kvjax.cache.method import CacheMethod
from kvjax.cache.plan import full_bytes, layer_bytes, resolve
from kvjax.calibration.calibrate import FINDERS
from kvjax.engine.calibrated import SUFFIX, Calibrated, load_calibration
from kvjax.engine.prefill import cache_dims
from kvjax.errors import UsageError
from kvjax.evaluation.defaults import DTYPE, REFERENCE
from kvjax.evaluation.figure import byte_size, percent
from kvjax.evaluation.setting import LEAST_PROMPT
from kvjax.evaluation.summary import SAME_MEMORY
from kvjax.models.language_model import LanguageModel

Kind = Literal["whole", "evicts", "fewer bits", "both"]

#: More than one setting of a method whose bytes follow from its bits; the default is one of them.
SETTINGS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "kivi-2": ("kivi-2", "kivi-2:residual=32"),
        "int8_channel": ("int8_channel", "int8_channel:bits=4"),
        "think": ("think", "think:share=0.25"),
        "kvtuner": ("kvtuner", "kvtuner:table=k4v2"),
        "polarquant_pairs": ("polarquant_pairs", "polarquant_pairs:value_bits=4"),
        "quest": ("quest:tokens=256",),
        "actqkv": ("actqkv:tokens=256,page=16,recent=64",),
        "kivi_released": ("kivi_released:residual=32",),
    }
)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One method at one size.

    Attributes:
      name: of the method. kind: what it does to tokens.
      size: the share of the full bf16 cache that it was to take; None where it takes what it takes.
      setting: how records and `kvjax compare` call it. share: what a row's cache takes of the full bf16 cache.
      contender: what runs; None where the size cannot be reached, and `reason` says why.
    """

    name: str
    kind: Kind
    size: float | None
    setting: str = ""
    share: float = 0.0
    contender: CacheMethod | Calibrated | None = None
    reason: str = ""

    @property
    def fits(self) -> bool:
        """Whether it takes no more than its size."""
        return self.size is not None and self.share <= (1 + SAME_MEMORY) * self.size


@dataclasses.dataclass(frozen=True)
class Entrant:
    """A method before its size is chosen.

    Attributes:
      variants: its settings by name; more than one only where a budget does not decide its bytes.
    """

    name: str
    variants: Mapping[str, CacheMethod | Calibrated]


def entrants(named: Sequence[str], folder: Path | None, model: LanguageModel) -> tuple[list[Entrant], list[str]]:
    """The methods of a board, and the names of those that would have to be calibrated first.

    Args:
      named: as `kvjax compare` takes them, without a budget; all named methods where there is none.
      folder: of calibrations, which join under the names of their files.

    Raises:
      UsageError: an unknown name, no such folder, or a calibration to another model.
    """
    dims = cache_dims(model, 1, LEAST_PROMPT, LEAST_PROMPT, DTYPE)
    calibrated = [_calibrated(path, model) for path in _files(folder)]
    made = {one.name for one in calibrated}
    chosen, missing = [], []
    for name in dict.fromkeys(named or methods.METHODS):
        method = methods.parse(name)
        if name == REFERENCE or name in made:
            continue
        if not named and method.policy.needs_hiding and not any(layer.selective for layer in dims):
            continue  # for models with selective attention only
        if any(finder.fits(method, tuple(dims)) for finder in FINDERS):
            missing.append(name)
        else:
            chosen.append(Entrant(name, {s: methods.parse(s) for s in SETTINGS.get(name, (name,))}))
    return [*chosen, *calibrated], missing


def cells(entrant: Entrant, dims: Sequence[CacheDims], sizes: Sequence[float]) -> list[Cell]:
    """A cell for each size, and for each setting whose bytes are near none of them.

    Budgets are the largest that fit. A setting of fixed bytes stands at the size nearest to it, counted in halvings,
    and so may take up to 1.4 times as much: `Cell.fits` tells.

    Args:
      dims: of the batch that is measured: its rows share what a method has learnt, in `Cell.share` as in the records. A
        budget in bytes is one row's, and counts all of that.
    """
    first = next(iter(entrant.variants.values()))
    budget = _method(first).budget
    if isinstance(budget, Sized):
        return [_sized(entrant.name, first, dims, size, _with_bytes, "bytes") for size in sizes]
    if isinstance(budget, HeadTable | LayerTable):
        return [_sized(entrant.name, first, dims, size, _with_window, "recent") for size in sizes]
    return _fixed(entrant, dims, sizes)


def kind(method: CacheMethod) -> Kind:
    """What a method does to tokens."""
    if method.budget.evicts:
        return "both" if method.codes else "evicts"
    return "fewer bits" if method.codes else "whole"


def share_of(method: CacheMethod, dims: Sequence[CacheDims]) -> float:
    """Allocated bytes over those of a full bf16 cache's keys and values."""
    return sum(layer_bytes(method, layer) for layer in dims) / full_bytes(dims)


def size_name(size: float | None) -> str:
    """ "1/4"."""
    return "as it is" if size is None else f"1/{round(1 / size)}"


def _sized(
    name: str,
    entrant: CacheMethod | Calibrated,
    dims: Sequence[CacheDims],
    size: float,
    resize: Callable[[CacheMethod, Sequence[CacheDims], int], tuple[CacheMethod, int]],
    option: str,
) -> Cell:
    """The cell of a method that `resize` brings to a number of bytes."""
    method = _method(entrant)
    empty = Cell(name, kind(method), size)
    rows = [dataclasses.replace(layer, batch=1) for layer in dims]
    try:
        resized, value = resize(method, rows, int(size * full_bytes(rows)))
        return _filled(empty, _spelled(name, option, value), entrant, resized, dims)
    except UsageError as error:
        return dataclasses.replace(empty, reason=str(error))


def _fixed(entrant: Entrant, dims: Sequence[CacheDims], sizes: Sequence[float]) -> list[Cell]:
    """The cells of a method whose settings decide its bytes."""
    made, refused = [], []
    for setting, variant in entrant.variants.items():
        method = _method(variant)
        cell = Cell(entrant.name, kind(method), None)
        try:
            made.append(_filled(cell, setting, variant, method, dims))
        except UsageError as error:
            refused.append(str(error))
    taken: dict[float, Cell] = {}
    for cell in made:
        size = 2.0 ** round(math.log2(cell.share))
        if size in sizes and (size not in taken or _nearer(cell, taken[size], size)):
            taken[size] = dataclasses.replace(cell, size=size)
    reason = "; ".join(refused) or f"its settings take {', '.join(percent(cell.share) for cell in made)}"
    placed = {cell.setting for cell in taken.values()}
    elsewhere = [
        cell for cell in made if cell.setting not in placed and 2.0 ** round(math.log2(cell.share)) not in taken
    ]
    blank = Cell(entrant.name, kind(_method(next(iter(entrant.variants.values())))), None, reason=reason)
    return [taken.get(size) or dataclasses.replace(blank, size=size) for size in sizes] + elsewhere


def _nearer(one: Cell, other: Cell, size: float) -> bool:
    return abs(math.log(one.share / size)) < abs(math.log(other.share / size))


def _filled(
    cell: Cell, setting: str, entrant: CacheMethod | Calibrated, method: CacheMethod, dims: Sequence[CacheDims]
) -> Cell:
    share, method = share_of(method, dims), dataclasses.replace(method, name=setting)
    contender = dataclasses.replace(entrant, method=method) if isinstance(entrant, Calibrated) else method
    return dataclasses.replace(cell, setting=setting, share=share, contender=contender)


def _with_bytes(method: CacheMethod, dims: Sequence[CacheDims], limit: int) -> tuple[CacheMethod, int]:
    """The method with the largest budget that takes at most `limit` bytes."""
    budget, longest = method.budget, max(layer.prompt_length for layer in dims)
    assert isinstance(budget, Sized)
    share_of(dataclasses.replace(method, budget=budget.with_tokens(longest)), dims)  # raises where a part does not fit
    budget = dataclasses.replace(budget, tokens_kept=None, share=None, bytes_kept=limit)
    try:
        return resolve(dataclasses.replace(method, budget=budget), dims), limit
    except UsageError as error:
        raise UsageError(f"even its smallest budget takes more than {byte_size(limit)}") from error


def _with_window(method: CacheMethod, dims: Sequence[CacheDims], limit: int) -> tuple[CacheMethod, int]:
    """The method whose heads or layers that keep a window keep the largest that takes at most `limit` bytes."""

    def windowed(recent: int) -> CacheMethod:
        budget = method.budget.with_tokens(method.sinks + recent)
        return dataclasses.replace(method, budget=budget, recent=recent)

    low, high = 0, max(layer.prompt_length for layer in dims)  # low fits, or is 0
    while low < high:
        middle = (low + high + 1) // 2
        if sum(layer_bytes(windowed(middle), layer) for layer in dims) <= limit:
            low = middle
        else:
            high = middle - 1
    if low == 0:
        raise UsageError(f"even with a window of one token it takes more than {byte_size(limit)}")
    return windowed(low), low


def _spelled(name: str, option: str, value: int) -> str:
    """The name with one option more, at the part of a combination that has such an option."""
    parts = name.split("+")
    at = next((i for i, part in enumerate(parts) if option in _options(part)), 0)
    parts[at] += f"{',' if ':' in parts[at] else ':'}{option}={value}"
    return "+".join(parts)


def _options(part: str) -> Sequence[str]:
    build = methods.METHODS.get(part.partition(":")[0])
    return [] if build is None else list(inspect.signature(build).parameters)


def _files(folder: Path | None) -> list[Path]:
    if folder is None:
        return []
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder} of calibrations; `kvjax calibrate --out {folder}/NAME{SUFFIX}`")
    return sorted(folder.glob(f"*{SUFFIX}"))


def _calibrated(path: Path, model: LanguageModel) -> Entrant:
    found = load_calibration(path)
    found.check(model)
    return Entrant(path.stem, {path.stem: found})


def _method(entrant: CacheMethod | Calibrated) -> CacheMethod:
    return entrant.method if isinstance(entrant, Calibrated) else entrant
