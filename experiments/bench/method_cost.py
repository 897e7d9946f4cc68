"""What each method costs in one layer: making its cache of a prompt, a decode step, compiling both, and temporaries.

All programs are compiled first and then take turns, so that what else the machine does hits all of them alike.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from experiments.bench.one_layer import Setting, rising_data
from experiments.bench.race import Laps, race
from experiments.hardware_table.hlo import largest_intermediate
from kvjax.cache.codec import Integer
from kvjax.cache.head_split import AnyLayer
from kvjax.cache.method import CacheMethod
from kvjax.cache.methods import parse
from kvjax.cache.policy import Policy
from kvjax.cache.step import Step
from kvjax.errors import UsageError

Record = dict[str, Any]
Runner = Callable[[int], None]

FULL = "full"
SOME_QUERIES, EVERY_QUERY = 0.10, 0.60
"""Goals: selecting and compressing as a share of an exact prefill, by what scores look at."""
STEP, STEP_OF_4_BITS = 1.0, 1.1
"""Goals: a decode step in steps of the full bfloat16 cache."""
COMPILED = 2.5
"""Goal: seconds to compile in those that the full cache takes."""
STEPS = 4
"""Decoded tokens per timing."""
COMPILED_AGAIN = 8
"""After how many methods the full cache is compiled once more: its time is the median."""


class Compiling(NamedTuple):
    """Seconds from Python to machine code, and those that this process computed meanwhile."""

    seconds: float
    processor: float


@dataclasses.dataclass
class Entry:
    """A method, its compiled programs, and the cache that steps go on with.

    Attributes:
      compiling: of the program that makes the cache, and of a decode step.
      largest, temporaries: bytes of the largest array that a decode step makes beside its arguments and results, and of
        all of them together.
    """

    method: CacheMethod
    compress: Callable[[], AnyLayer]
    step: Callable[[AnyLayer], tuple[jax.Array, AnyLayer]]
    compiling: tuple[Compiling, Compiling]
    largest: int
    temporaries: int
    cache: AnyLayer | None = None

    @property
    def steps(self) -> int:
        """Tokens per timing: where tokens compete now and then only, as many as come between."""
        return max(STEPS, self.method.every or 1)

    def make(self, calls: int) -> None:
        """Makes the cache, `calls` times."""
        for _ in range(calls):
            jax.block_until_ready(self.compress())

    def decode(self, calls: int) -> None:
        """Decodes `steps` tokens, `calls` times."""
        assert self.cache is not None
        for _ in range(calls * self.steps):
            _, self.cache = self.step(self.cache)
        jax.block_until_ready(self.cache)


def measure(
    setting: Setting, names: Sequence[str], *, prompts: int, rounds: int, seed: int, advance: Callable[..., None]
) -> Record:
    """The record of all methods, the full cache first.

    Args:
      names: of methods, in the language of `parse`.
      prompts, rounds: how often everybody makes a cache, and decodes.
      advance: called after each compilation and each round.
    """
    bench = _Bench(setting, advance)
    left_out: dict[str, str] = {}
    entries: dict[str, Entry] = {}
    whole: list[tuple[Compiling, Compiling]] = []
    for place, name in enumerate(dict.fromkeys((FULL, *names))):
        if place % COMPILED_AGAIN == 0:
            whole.append(bench.enter(parse(FULL)).compiling)
        method = parse(name)
        if method.repetition is not None:
            left_out[name] = "its scores come from another pass over the model, which a layer cannot make"
            continue
        entries[name] = bench.enter(method)
        advance(note=name)
    make, step = (Compiling(*map(statistics.median, zip(*each, strict=True))) for each in zip(*whole, strict=True))
    entries[FULL].compiling = make, step
    runners: dict[str, Runner] = {name: entry.make for name, entry in entries.items()}
    shared = {"prefill": bench.prefill, "attention": bench.attention}
    made = race({**shared, **runners}, prompts, seed=seed, warm_up=1, advance=advance)
    for entry in entries.values():
        entry.cache = jax.block_until_ready(entry.compress())
    decoded = race({name: entry.decode for name, entry in entries.items()}, rounds, seed=seed, advance=advance)
    return {
        "setting": dataclasses.asdict(setting),
        **{name: _laps(made[name], times=setting.batch) for name in shared},
        "compile_prefill": bench.compile_prefill._asdict(),
        "methods": {name: _record(setting, entry, made[name], decoded[name]) for name, entry in entries.items()},
        "left_out": left_out,
    }


def turns(names: Sequence[str], prompts: int, rounds: int) -> int:
    """How often `measure` calls `advance`."""
    return len({FULL, *names}) + prompts + rounds


def reserved(rounds: int) -> int:
    """Tokens that a cache without eviction must have room for."""
    return STEPS * (rounds + 2)


def looks_at_every_query(method: CacheMethod) -> bool:
    """Whether a method's scores of a prompt need the attention of all its queries."""
    policy: Policy = method.policy
    while (inner := getattr(policy, "inner", None)) is not None:
        policy = inner
    return method.budget.evicts and policy.mass_reduce is not None and not policy.forgets


def share_goal(method: CacheMethod) -> float | None:
    """The most that making the cache may cost, as a share of the prefill; None where no tokens are selected."""
    if not method.budget.evicts:
        return None
    return EVERY_QUERY if looks_at_every_query(method) else SOME_QUERIES


def step_goal(method: CacheMethod) -> float | None:
    """The most that a decode step may cost, in steps of the full cache; None where there is no goal."""
    if not method.codes:
        return STEP if method.budget.evicts else None
    bits = {codec.bits for codec in method.every_codec if isinstance(codec, Integer) and codec.axis == "token"}
    plain = all(isinstance(codec, Integer) and codec.axis == "token" for codec in method.every_codec)
    goals: dict[tuple[int, ...], float] = {(8,): STEP, (4,): STEP_OF_4_BITS}
    return goals.get(tuple(bits)) if plain else None


class _Bench:
    """The layer, its inputs, and what compiles a method for them."""

    def __init__(self, setting: Setting, advance: Callable[..., None]) -> None:
        self.setting = setting
        self.params, self.rows = setting.weights(), setting.rows()
        self._prefill, self.compile_prefill = _compiled(setting.prompt, self.params, self.rows[:1])
        self._one_row = self._prefill(self.params, self.rows[:1])[1]
        self._attention, _ = _compiled(setting.attention, self._one_row)
        record, _ = _compiled(setting.record, self.params, self.rows)
        self._recorded = jax.block_until_ready(record(self.params, self.rows))
        self._token: Step = jax.jit(setting.token)(self.params)
        advance(steps=0, note="prompt")

    def prefill(self, calls: int) -> None:
        """The whole layer over one row."""
        for _ in range(calls):
            jax.block_until_ready(self._prefill(self.params, self.rows[:1]))

    def attention(self, calls: int) -> None:
        """Exact attention of one row to itself."""
        for _ in range(calls):
            jax.block_until_ready(self._attention(self._one_row))

    def enter(self, method: CacheMethod) -> Entry:
        """Compiles a method."""
        setting = self.setting
        method.check(setting.dims)
        data = rising_data(method, setting.dims)

        def make(recorded: Any, data: Any) -> AnyLayer:
            return setting.compress(method, recorded, data)

        compress, compress_compiling = _compiled(make, self._recorded, data)
        cache = jax.eval_shape(make, self._recorded, data)
        decode, decode_compiling = _compiled(setting.decode, cache, self._token, donate_argnums=(0,))
        return Entry(
            method,
            compress=lambda: compress(self._recorded, data),
            step=lambda cache: decode(cache, self._token),
            compiling=(compress_compiling, decode_compiling),
            largest=largest_intermediate(decode.as_text()),
            temporaries=decode.memory_analysis().temp_size_in_bytes,
        )


def _compiled(function: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[Any, Compiling]:
    """The compiled program, and what it took, nothing of it known before."""
    jax.clear_caches()
    began, computing = time.perf_counter(), time.process_time()
    program = jax.jit(function, **options).lower(*arguments).compile()
    return program, Compiling(time.perf_counter() - began, time.process_time() - computing)


def _laps(laps: Laps, times: float = 1) -> Mapping[str, list[float]]:
    return {
        "seconds": [times * x for x in laps.seconds],
        "processor_seconds": [times * x for x in laps.processor],
    }


def _record(setting: Setting, entry: Entry, made: Laps, decoded: Laps) -> Record:
    method, cache = entry.method, entry.cache
    assert cache is not None
    return {
        "compress": _laps(made),
        "decode": _laps(decoded, 1 / entry.steps),
        "compile": [one._asdict() for one in entry.compiling],
        "largest": entry.largest,
        "temporaries": entry.temporaries,
        "dequantised": 4 * setting.batch * setting.kv_heads * setting.head_dim * _slots(cache),
        "cache": sum(leaf.nbytes for leaf in jax.tree.leaves(cache)),
        "every_query": looks_at_every_query(method),
        "goals": {"share": share_goal(method), "step": step_goal(method)},
    }


def _slots(cache: AnyLayer) -> int:
    """Tokens that a row and kv head has slots for, on average, in all segments."""
    slots = [
        (part.head_index.shape[0], sum(segment.per_head(part.head_index.shape[0])[1] for segment in part.segments))
        for part in cache.parts
    ]
    return round(sum(heads * count for heads, count in slots) / sum(heads for heads, _ in slots))


def check(names: Sequence[str], setting: Setting) -> None:
    """Raises UsageError for a name that is no method, or no method for these sizes."""
    for name in names:
        try:
            parse(name).check(setting.dims)
        except UsageError as error:
            raise UsageError(f"--methods {name}: {error}") from error
