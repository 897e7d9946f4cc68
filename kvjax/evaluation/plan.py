"""`Plan`: a comparison that has been checked, and the loop that runs it."""

from __future__ import annotations

import dataclasses
import gc
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from kvjax.cache.method import CacheMethod
from kvjax.engine.calibrated import Calibrated
from kvjax.engine.request import check_kind
from kvjax.errors import NumericsError, UsageError
from kvjax.evaluation import accuracy, defaults, profile
from kvjax.evaluation.batch import Batch, can_stream
from kvjax.evaluation.contender import CommonBudget, Contender, contenders
from kvjax.evaluation.setting import Setting
from kvjax.evaluation.summary import same_memory
from kvjax.evaluation.tally import Tally
from kvjax.evaluation.workload import WORKLOADS, Item, Source, expand, room
from kvjax.models.language_model import LanguageModel
from kvjax.progress import Advance, Track, silent

Record = dict[str, Any]

KEY = ("method", "task", "context", "seed")
GROUP = 32
"""Methods whose compiled programs are kept at once: each maps memory, and Linux allows 65,530 maps a process, which
those of 44 methods took."""
CANNOT_STREAM = "needs whole prompts, so no text can be streamed through it"


@dataclasses.dataclass(frozen=True)
class Options:
    """How a comparison is done; see `kvjax.compare`."""

    context: int | Sequence[int] | None = None
    seeds: int = defaults.SEEDS
    examples: int = defaults.EXAMPLES
    batch: int = defaults.BATCH
    budget: str | None = None
    query_aware: bool = False
    dtype: str = defaults.DTYPE
    chunk: int = defaults.CHUNK
    attention_errors: bool = True


class Unit(NamedTuple):
    """One task and seed at one context, with the methods of a group that are still to be measured on it."""

    setting: Setting
    group: int
    task: str
    seed: int
    methods: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is going to be measured.

    Attributes:
      contenders: the methods, baselines first.
      fitted: per setting, the methods by name, with their budgets in tokens.
      tasks: names of workloads.
    """

    model: LanguageModel
    source: Source
    contenders: tuple[Contender, ...]
    fitted: Mapping[Setting, Mapping[str, CacheMethod]]
    tasks: tuple[str, ...]
    options: Options

    @classmethod
    def make(
        cls,
        model: LanguageModel,
        methods: Sequence[str | CacheMethod | Calibrated],
        tasks: Sequence[str],
        options: Options,
    ) -> Plan:
        """Checks everything that can be checked before the model runs; arguments and errors as in `kvjax.compare`."""
        check_kind("model", model, LanguageModel, 'kvjax.load("reference")')
        for name in ("seeds", "examples", "batch", "chunk"):
            if getattr(options, name) < 1:
                raise UsageError(f"{name} must be at least 1, got {getattr(options, name)}")
        chosen, named = contenders(methods), expand(tasks)
        if not named:
            raise UsageError(f"no task is named; choose from {', '.join(WORKLOADS)}")
        source = Source(model)
        common = CommonBudget.parse(options.budget)
        fitted = {}
        for setting in _settings(model, source, options):
            setting.check(model)
            for task in named:
                WORKLOADS[task].items(source, setting, 1, 0)
            if not setting.has_keys(model):
                chosen = [contender for contender in chosen if contender.name == defaults.REFERENCE]
            fitted[setting] = {c.name: c.fit(common, model, setting) for c in chosen}
        return cls(model, source, tuple(chosen), fitted, tuple(named), options)

    @property
    def config(self) -> Record:
        """What is compared, for reports; `budgeted` names the methods that the common budget binds."""
        common = CommonBudget.parse(self.options.budget)
        return dataclasses.asdict(self.options) | {
            "model": self.model.name,
            "methods": [contender.name for contender in self.contenders],
            "budgeted": [contender.name for contender in self.contenders if contender.follows(common)],
            "tasks": list(self.tasks),
            "context": [setting.context for setting in self.fitted],
        }

    def run(self, done: Iterable[Record] = (), track: Track = silent) -> Iterator[Record]:
        """Measures what is not in `done`, and yields each record as soon as it is finished.

        Raises:
          KvjaxError: a cache's live buffers are not what its method declares.
          NumericsError: a measurement is not a finite number.
        """
        units = self._units(done)
        costs: dict[Setting, dict[str, Record]] = {setting: {} for setting in self.fitted}
        warmed: set[tuple[Setting, bool]] = set()
        total = sum(-(-self.options.examples // unit.setting.batch) * len(unit.methods) for unit in units)
        with track("compare", total) as advance:
            for before, unit in zip([None, *units], units, strict=False):
                if before is not None and before[:2] != unit[:2]:
                    warmed.clear()
                    jax.clear_caches()
                    gc.collect()
                if (kind := (unit.setting, WORKLOADS[unit.task].streamed)) not in warmed:
                    self._warm(unit, advance)
                    warmed.add(kind)
                known = costs[unit.setting]
                known |= self._profile(unit.setting, [n for n in unit.methods if n not in known], advance)
                for record in self._measure(unit, advance):
                    notes = [note for note in (known[record["method"]]["note"], record.pop("note")) if note]
                    yield _finite(record | known[record["method"]] | {"note": "; ".join(notes)})

    def _units(self, done: Iterable[Record]) -> list[Unit]:
        """What is left to do, group by group; the methods of a group share their exact passes over the prompts."""
        finished = {tuple(record[key] for key in KEY) for record in done}
        size = GROUP // len({WORKLOADS[task].streamed for task in self.tasks})  # streamed text has programs of its own
        units = []
        for setting, methods in self.fitted.items():
            names = list(methods)
            starts = range(0, len(names), size)
            for start, task, seed in itertools.product(starts, self.tasks, range(self.options.seeds)):
                group = names[start : start + size]
                left = tuple(name for name in group if (name, task, setting.context, seed) not in finished)
                units += [Unit(setting, start, task, seed, left)] if left else []
        return units

    def _able(self, unit: Unit) -> dict[str, CacheMethod]:
        """The methods of a unit that can run its workload."""
        methods = {name: self.fitted[unit.setting][name] for name in unit.methods}
        return {n: m for n, m in methods.items() if can_stream(m)} if WORKLOADS[unit.task].streamed else methods

    def _batch(self, setting: Setting, items: Sequence[Item]) -> Batch:
        calibrated = {one.name: one.calibrated for one in self.contenders if one.calibrated is not None}
        return Batch(self.model, setting, items, calibrated)

    def _warm(self, unit: Unit, advance: Advance) -> None:
        """Compiles what a unit's methods need; units of the same shapes share it."""
        advance(0, note="compiling")
        items = WORKLOADS[unit.task].items(self.source, unit.setting, unit.setting.batch, unit.seed)
        batch, reference = self._batch(unit.setting, items), self.fitted[unit.setting][defaults.REFERENCE]
        for name in accuracy.warm(batch, reference, self._able(unit), self.options.attention_errors):
            advance(0, note=f"compiled {name}")

    def _measure(self, unit: Unit, advance: Advance) -> Iterator[Record]:
        """Accuracy and fidelity of every method of a unit."""
        setting, workload, able = unit.setting, WORKLOADS[unit.task], self._able(unit)
        tallies = {name: Tally() for name in unit.methods}
        items = workload.items(self.source, setting, self.options.examples, unit.seed)
        for start in range(0, len(items), setting.batch):
            batch = self._batch(setting, items[start : start + setting.batch])
            errors = self.options.attention_errors and start == 0
            for name in accuracy.run(batch, self.fitted[setting][defaults.REFERENCE], able, tallies, errors):
                advance(1, note=f"{unit.task} {name}")
            advance(len(unit.methods) - len(able))
        for name in unit.methods:
            key = {"method": name, "task": unit.task, "context": setting.context, "seed": unit.seed}
            yield key | tallies[name].results(workload.scored) | {"note": "" if name in able else CANNOT_STREAM}

    def _profile(self, setting: Setting, names: Sequence[str], advance: Advance) -> dict[str, Record]:
        """What the methods cost, by name."""
        if not names:
            return {}
        items = WORKLOADS["perplexity-prefill"].items(self.source, setting, setting.batch, seed=0)
        batch, common = self._batch(setting, items), CommonBudget.parse(self.options.budget)
        one_pass = profile.time_pass(batch)
        fields = {}
        for contender in self.contenders:
            if contender.name in names:
                advance(0, note=f"profile {contender.name}")
                cost = profile.measure(batch, self.fitted[setting][contender.name], one_pass)
                target = contender.target_bytes(common, setting.dims(self.model))
                fields[contender.name] = _fields(cost, target) | {
                    "batch": setting.batch,
                    "budget": self.options.budget,
                    "query_aware": setting.query_aware,
                }
        return fields


def _settings(model: LanguageModel, source: Source, options: Options) -> list[Setting]:
    context = min(defaults.CONTEXT, model.config.max_positions) if options.context is None else options.context
    lengths = [context] if isinstance(context, int) else dict.fromkeys(context)
    batch, follow = min(options.batch, options.examples), room(source.vocabulary)
    return [Setting(length, follow, batch, options.query_aware, options.dtype, options.chunk) for length in lengths]


def _fields(cost: profile.Cost, target: int | None) -> Record:
    """A record's part that says what a method costs; target: bytes of a row that it was to take."""
    notes = [cost.note] if cost.note else []
    if target is not None and not same_memory(cost.cache_bytes, target):
        notes.append(f"{cost.cache_bytes / target:.0%} of the budget's bytes")
    return {
        "cache_bytes": cost.cache_bytes,
        "effective_bytes": cost.effective_bytes,
        "layer_bytes": list(cost.layer_bytes),
        "bytes_per_token": cost.bytes_per_token,
        "bits_per_element": cost.bits_per_element,
        "ratio": cost.ratio,
        "tokens_held": cost.tokens_held,
        "prefill_ms": cost.prefill.median,
        "prefill_ms_quartiles": [cost.prefill.low, cost.prefill.high],
        "decode_ms_per_token": cost.decode.median,
        "decode_ms_quartiles": [cost.decode.low, cost.decode.high],
        "note": "; ".join(notes),
    }


def _finite(record: Record) -> Record:
    """The record; raises NumericsError where a number in it is a NaN or an infinity."""
    wrong = [name for name, value in record.items() if not np.all(np.isfinite(_numbers(value)))]
    if wrong:
        where = ", ".join(f"{name} {record[name]}" for name in KEY)
        raise NumericsError(
            f"{' and '.join(wrong)} of {where} came out as {', '.join(str(record[name]) for name in wrong)}, not a "
            f"finite number, so the run stops. The model's outputs overflow or its weights hold such numbers: check "
            f"them with the method 'full' and dtype float32; if full is finite there, the method's codec overflows."
        )
    return record


def _numbers(value: Any) -> list[float]:
    values = value if isinstance(value, list) else [value]
    return [one for one in values if isinstance(one, int | float)]
