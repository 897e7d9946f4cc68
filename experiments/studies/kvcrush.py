"""Claim: at a quarter of the memory, places for tokens that stand for the evicted ones make a policy better."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from experiments.studies.planted import unshared_heads
from experiments.studies.study import Claim, Condition, Study, at, sized
from kvjax.cache import methods
from kvjax.cache.fate import Represent

SIZE = 0.25
TASKS = ("needle", "kv", "multiquery")
ON_H2O = dataclasses.replace(methods.h2o(), name="kvcrush on h2o", fate=Represent(), every=None)
H2O = dataclasses.replace(methods.h2o(), name="h2o, once", every=None)
ENTRIES = (
    *sized("kvcrush", SIZE),
    *sized("snapkv", SIZE),
    *sized("kvcrush on h2o", SIZE, method=ON_H2O),
    *sized("h2o, once", SIZE, method=H2O),
)
UNSHARED = "unshared heads"
PAPER = "LongBench, 4 times smaller: less than 1 % lost, best of its kind (abstract; tables not verified)"


def _claims(condition: str) -> Iterator[Claim]:
    for method, base in (("kvcrush", "snapkv"), ("kvcrush on h2o", "h2o, once")):
        says = f"{condition}: {method} answers more than {base}"
        yield Claim(says, PAPER, condition, "score", at(method, SIZE), at(base, SIZE), "higher")


STUDY = Study(
    "KVCrush (Jha et al., 2025, arXiv 2503.00022)",
    (
        Condition("as it is", ENTRIES, TASKS),
        Condition("question hidden", ENTRIES, TASKS, query_aware=False),
        Condition(
            UNSHARED,
            ENTRIES,
            TASKS,
            model=unshared_heads,
            why="Each query head has a copy of its kv head, so that a token's signature has 8 bits instead of 2.",
        ),
    ),
    (
        *_claims("as it is"),
        *_claims("question hidden"),
        *_claims(UNSHARED),
        Claim(
            "as it is: kvcrush answers as much as the full cache, up to 1 point",
            "less than 1 % lost",
            "as it is",
            "score",
            at("kvcrush", SIZE),
            "full",
            "higher",
            margin=0.01,
        ),
    ),
)
