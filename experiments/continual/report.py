"""The table of the class-incremental study, and its record."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from experiments.continual.encoders import Encoder
from experiments.continual.measure import MEANS, Results
from experiments.studies.claim import student
from kvjax.evaluation.summary import Estimate

if TYPE_CHECKING:
    from experiments.bottleneck import Config

REFERENCE = "linear probe"


def page(config: Config, encoder: Encoder, results: Results) -> str:
    """Markdown: what was done, and a row per head with Student's 95 % intervals over seeds."""
    first = next(iter(results.outcomes.values()))
    tasks, size = len(first[0].seen), config.size
    headings = ["head", *(f"after task {at}" for at in range(1, tasks + 1)), "forgetting", "all at once", "rates"]
    lines = [
        f"{encoder.note} Pictures: {config.style}. Stream: {tasks} tasks of {config.per_task} classes that the encoder "
        f"has not seen, {size.train} images per class, {size.passes} passes per task, batches of {config.batch}, plain "
        f"gradient descent; {len(first)} seeds. Bottleneck: {config.codebooks} codebooks of {config.pairs} keys with "
        f"{config.key_dim} channels.",
        "",
        "| " + " | ".join(headings) + " |",
        "|---" * len(headings) + "|",
    ]
    for name, outcomes in results.outcomes.items():
        seen = [percent([o.seen[at] for o in outcomes]) for at in range(tasks)]
        rates = "/".join(f"{rate:g}" for rate in results.rates.get(name, ()))
        cells = [percent([o.forgetting for o in outcomes]), percent([o.joint for o in outcomes]), rates]
        lines.append("| " + " | ".join([name, *seen, *cells]) + " |")
    lines += ["", *differences(results)]
    return "\n".join(lines) + "\n"


def differences(results: Results) -> list[str]:
    """Of each head to the linear probe, seed by seed: final accuracy and forgetting, in points."""
    probe = results.outcomes[REFERENCE]
    lines = []
    for name, outcomes in results.outcomes.items():
        if name == REFERENCE:
            continue
        final = student([a.final - b.final for a, b in zip(outcomes, probe, strict=True)])
        forgot = student([a.forgetting - b.forgetting for a, b in zip(outcomes, probe, strict=True)])
        lines.append(f"- {name} minus {REFERENCE}: final accuracy {points(final)}, forgetting {points(forgot)}")
    return lines


def percent(values: Sequence[float]) -> str:
    """Mean and half of Student's 95 % interval in percent: "71.2 ±1.3"."""
    found = student(values)
    return f"{100 * found.mean:.1f} ±{100 * (found.high - found.mean):.1f}"


def points(difference: Estimate) -> str:
    """A difference of shares in points with its interval."""
    mean, low, high = (f"{100 * x:+.1f}".replace("-", "−") for x in (difference.mean, difference.low, difference.high))
    return f"{mean} points ({low} to {high})"


def record(config: Config, encoder: Encoder, results: Results) -> dict[str, Any]:
    """Everything measured, as JSON; accuracies that do not exist yet are null."""
    options = {key: value for key, value in dataclasses.asdict(config).items() if key != "out"}
    heads = {
        name: {
            "rates": results.rates.get(name) if name != MEANS else None,
            "seeds": [
                {
                    "accuracy": [[None if x != x else round(x, 4) for x in row] for row in o.accuracy.tolist()],
                    "forgetting": o.forgetting,
                    "joint": o.joint,
                }
                for o in outcomes
            ],
        }
        for name, outcomes in results.outcomes.items()
    }
    return {"config": options, "encoder": encoder.note, "heads": heads}
