"""From records to verdicts: the difference that a claim is about, its 95 % interval, and what that decides.

Scores are proportions of the same number of questions: the interval of each task is Wilson's, and that of a difference
comes from the limits of both (`kvjax.evaluation.summary.difference`), as in every table of this repository. Perplexity
and divergence are measured for both methods on the same texts, seed by seed: the interval is Student's over the
differences of the seeds, each a mean over that seed's examples.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax.numpy as jnp
from jax.scipy.special import betainc

from experiments.studies.study import Claim
from kvjax.errors import UsageError
from kvjax.evaluation.figure import number
from kvjax.evaluation.summary import Estimate, average, difference, names, wilson

Record = Mapping[str, Any]
Verdict = Literal["held", "did not hold", "cannot be shown here"]


@dataclasses.dataclass(frozen=True)
class Finding:
    """Attributes:
    method, against: what was measured of both, over all examples: the mean score, the perplexity (geometric mean
      over seeds), or nats per token.
    difference: the first minus the second, of logarithms for perplexity.
    verdict: "held" where the whole interval lies on the predicted side of the margin, "did not hold" where it lies
      on the other, and "cannot be shown here" where it lies on both.
    """

    method: float
    against: float
    difference: Estimate
    verdict: Verdict


def find(claim: Claim, records: Sequence[Record]) -> Finding:
    """What the records of a condition say to a claim.

    Raises:
      UsageError: one of the methods was not measured.
    """
    sides = [_of(records, claim, label) for label in (claim.method, claim.against)]
    if claim.measure == "score":
        first, second = map(_score, sides)
        apart = difference(first, second)
        return Finding(first.mean, second.mean, apart, verdict(claim, apart))
    first, second = (by_seed(side, claim.measure) for side in sides)
    apart = student([a - b for a, b in zip(first, second, strict=True)])
    means = [statistics.fmean(side) for side in (first, second)]
    ours, theirs = [math.exp(mean) for mean in means] if claim.measure == "perplexity" else means
    return Finding(ours, theirs, apart, verdict(claim, apart))


def verdict(claim: Claim, apart: Estimate) -> Verdict:
    """What an interval of the difference decides."""
    low, high = (apart.low, apart.high) if claim.predicted == "higher" else (-apart.high, -apart.low)
    if low > -claim.margin:
        return "held"
    return "did not hold" if high < -claim.margin else "cannot be shown here"


def student(differences: Sequence[float]) -> Estimate:
    """The mean of at least two independent differences with Student's 95 % interval."""
    mean, count = statistics.fmean(differences), len(differences)
    half = quantile(count - 1) * statistics.stdev(differences) / math.sqrt(count)
    return Estimate(mean, mean - half, mean + half)


def by_seed(records: Sequence[Record], measure: str) -> list[float]:
    """The mean over tasks of each seed, in the order of the seeds; of logarithms for perplexity."""
    seeds = sorted({record["seed"] for record in records})
    return [
        statistics.fmean(
            math.log(record["perplexity"]) if measure == "perplexity" else record["kl"]
            for record in records
            if record["seed"] == seed
        )
        for seed in seeds
    ]


@functools.cache
def quantile(freedom: int, tail: float = 0.025) -> float:
    """What Student's t with that many degrees of freedom exceeds with probability `tail`, to four digits."""
    low, high = 0.0, 1.0 / tail**2
    for _ in range(60):
        middle = 0.5 * (low + high)
        above = 0.5 * float(betainc(freedom / 2, 0.5, jnp.float32(freedom / (freedom + middle**2))))
        low, high = (middle, high) if above > tail else (low, middle)
    return high


def spelled(claim: Claim, finding: Finding) -> str:
    """Both values and the difference with its interval: "19.4 against 20.1: -3.5 % (-4.1 to -2.9)"."""
    d = finding.difference
    if claim.measure == "score":
        values = f"{100 * finding.method:.0f} % against {100 * finding.against:.0f} %"
        limits, unit = [100 * x for x in (d.mean, d.low, d.high)], "points"
        text = [f"{x:+.0f}" if round(x) else "0" for x in limits]
    elif claim.measure == "perplexity":
        values = f"{finding.method:.2f} against {finding.against:.2f}"
        unit, text = "%", [_percent(x) for x in (d.mean, d.low, d.high)]
    else:
        values = f"{number(finding.method)} against {number(finding.against)} nats"
        unit, text = "nats", [f"{x:+.2g}" for x in (d.mean, d.low, d.high)]
    return f"{values}: {text[0]} {unit} ({text[1]} to {text[2]})".replace("-", "−")


def prediction(claim: Claim) -> str:
    """ "lower", or "lower, or at most 1 % higher"."""
    if not claim.margin:
        return claim.predicted
    other = "lower" if claim.predicted == "higher" else "higher"
    amount = {
        "score": f"{100 * claim.margin:.0f} point{'' if claim.margin == 0.01 else 's'}",
        "perplexity": f"{100 * math.expm1(claim.margin):.2g} %",
        "divergence": f"{claim.margin:.2g} nats",
    }[claim.measure]
    return f"at most {amount} {other}"


def _percent(nats: float) -> str:
    return f"{100 * math.expm1(nats):+.1f}"


def _of(records: Sequence[Record], claim: Claim, label: str) -> list[Record]:
    name = {"score": "score", "perplexity": "perplexity", "divergence": "kl"}[claim.measure]
    found = [
        record
        for record in records
        if record["method"] == label
        and (not claim.tasks or record["task"] in claim.tasks)
        and record.get(name) is not None
    ]
    if not found:
        raise UsageError(f"{label!r} has no {claim.measure} under condition {claim.condition!r}")
    return found


def _score(records: Sequence[Record]) -> Estimate:
    tasks = names([record["task"]] for record in records)
    of_task = [[record for record in records if record["task"] == task] for task in tasks]
    return average([wilson(sum(r["score"] * r["examples"] for r in t), sum(r["examples"] for r in t)) for t in of_task])
