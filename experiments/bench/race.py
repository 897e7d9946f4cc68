"""Timing several programs against each other, so that whatever else the machine does hits all of them alike."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

WARM_UP = 2


class Laps(NamedTuple):
    """Times of one program, one entry per round.

    Attributes:
      seconds: of one computation, until its result is there.
      processor: seconds that all threads of this process were computing meanwhile. On a CPU that others use too it
        depends less on them.
      calls: computations in a row per round; their time is divided by it.
    """

    seconds: tuple[float, ...]
    processor: tuple[float, ...]
    calls: int


def race(
    runners: Mapping[str, Callable[[int], None]],
    rounds: int,
    *,
    seed: int = 0,
    least: float = 0.0,
    warm_up: int = WARM_UP,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, Laps]:
    """Runs all in every round, in a random order, after a warm-up.

    Args:
      runners: name -> function that computes n times and returns when the last result is there.
      rounds: how often each is timed.
      seed: of the orders.
      least: seconds; what takes less is computed several times in a row, so that starting it is not what is timed.
      warm_up: how often each runs before that.
      advance: called after each round.
    """
    calls = {name: _calls(run, least, warm_up) for name, run in runners.items()}
    laps: dict[str, list[tuple[float, float]]] = {name: [] for name in runners}
    order, shuffler = list(runners), random.Random(seed)
    for _ in range(rounds):
        shuffler.shuffle(order)
        for name in order:
            began, computing = time.perf_counter(), time.process_time()
            runners[name](calls[name])
            ended, computed = time.perf_counter(), time.process_time()
            laps[name].append(((ended - began) / calls[name], (computed - computing) / calls[name]))
        advance()
    return {name: Laps(*_columns(times), calls[name]) for name, times in laps.items()}


def _columns(times: list[tuple[float, float]]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return tuple(x for x, _ in times), tuple(x for _, x in times)


def _calls(run: Callable[[int], None], least: float, warm_up: int) -> int:
    run(warm_up)
    if not least:
        return 1
    began = time.perf_counter()
    run(1)
    return max(1, math.ceil(least / max(time.perf_counter() - began, 1e-6)))
