"""What a contest's times say: medians with quartiles, bandwidth, and ratios between entrants of the same rounds."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

Record = dict[str, Any]

READ = "read"


@dataclasses.dataclass(frozen=True)
class Spread:
    """A median and the quartiles around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


@dataclasses.dataclass(frozen=True)
class Row:
    """One entrant of one contest.

    Attributes:
      time: seconds of one computation.
      processor: median seconds that this process computed meanwhile.
      moves: bytes.
      bandwidth: bytes per second, moves / median time.
      of_read: bandwidth as a share of what plain reading reached in the same contest; None without such an entrant.
      temporaries: bytes, or None.
      error: largest difference from the definition, relative to the largest magnitude; None where not checked.
      ratios: how many times as fast as another entrant, by its name.
      processor_ratios: how many times less processor time than the same entrants.
    """

    name: str
    time: Spread
    processor: float
    moves: int
    bandwidth: float
    of_read: float | None
    temporaries: int | None
    error: float | None
    ratios: dict[str, Spread]
    processor_ratios: dict[str, Spread]


def rows(contest: Record) -> list[Row]:
    """The entrants of a contest's record, in the order of the record."""
    entrants: dict[str, Record] = contest["entrants"]
    reading = _bandwidth(entrants[READ]) if READ in entrants else None

    def row(name: str, entrant: Record) -> Row:
        others = [base for base in (*contest["bases"], entrant["naive"]) if base in entrants and base != name]
        bandwidth = _bandwidth(entrant)
        return Row(
            name=name,
            time=Spread.of(entrant["seconds"]),
            processor=statistics.median(entrant["processor_seconds"]),
            moves=entrant["moves"],
            bandwidth=bandwidth,
            of_read=None if reading is None else bandwidth / reading,
            temporaries=entrant["temporaries"],
            error=entrant["error"],
            ratios={base: ratio(entrants[base], entrant) for base in others},
            processor_ratios={base: ratio(entrants[base], entrant, "processor_seconds") for base in others},
        )

    return [row(name, entrant) for name, entrant in entrants.items()]


def ratio(base: Record, entrant: Record, time: str = "seconds") -> Spread:
    """How many times as fast as `base` an entrant is: the ratios of the rounds, which both ran in.

    `time` is "seconds" or "processor_seconds".
    """
    pairs = zip(base[time], entrant[time], strict=True)
    return Spread.of([slow / fast for slow, fast in pairs])


def title(contest: Record) -> str:
    """ "decode_attention: batch 4, context 4096, heads 32:8, head_dim 128"."""
    return f"{contest['op']}: {', '.join(f'{name} {value}' for name, value in contest['case'].items())}"


def plain(contest: Record) -> Record:
    """The summary as JSON."""
    return {"op": contest["op"], "case": contest["case"], "rows": [dataclasses.asdict(row) for row in rows(contest)]}


def _bandwidth(entrant: Record) -> float:
    return entrant["moves"] / statistics.median(entrant["seconds"])
