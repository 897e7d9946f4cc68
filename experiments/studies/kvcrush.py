"""Claim: at a quarter of the memory, places for tokens that stand for the evicted ones make a policy better.

KVCrush here is a reconstruction from descriptions, on SnapKV and on H2O's scores at the end of the prompt; the
paper's tables are not verified.

It makes no policy better here. With SnapKV's window of 64 queries, of which a question is 3 to 14, the base policy
itself fails (32 %), and a quarter fewer of its best tokens cost 10 points more; on H2O, and with the question hidden,
nothing can be told at 7 to 13 %. With a window of 8 queries the base policy answers everything, and so does KVCrush:
4 times smaller and nothing lost, as in the abstract, but not by its merit. (A bound of 1 point needs more than 240
questions to be shown.)

The reason is what is asked. A representative stands for tokens that heads treat alike, and in a text where many
tokens say similar things one of them may do. Here a record is a few tokens of random words: no other token can answer
for it, so that a place for a representative is a place less for a record. Signatures of 2 bits (2 kv heads) are not
to blame alone, since with 8 bits the difference is the same, 8 points.
"""

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
SHORT = "short window"
SHORT_ENTRIES = (
    *sized("kvcrush, window 8", SIZE, method="kvcrush:window=8"),
    *sized("snapkv, window 8", SIZE, method="snapkv:window=8"),
)
UNSHARED = "unshared heads"
PAPER = "LongBench, 4 times smaller: less than 1 % lost, best of its kind (abstract; tables not verified)"


def _claims(condition: str, *pairs: tuple[str, str]) -> Iterator[Claim]:
    for method, base in pairs or (("kvcrush", "snapkv"), ("kvcrush on h2o", "h2o, once")):
        says = f"{condition}: {method} answers more than {base}"
        yield Claim(says, PAPER, condition, "score", at(method, SIZE), at(base, SIZE), "higher")


def _whole(condition: str, method: str) -> Claim:
    return Claim(
        f"{condition}: {method} answers as much as the full cache, up to 1 point",
        "less than 1 % lost",
        condition,
        "score",
        at(method, SIZE),
        "full",
        "higher",
        margin=0.01,
    )


STUDY = Study(
    "KVCrush (Jha et al., 2025, arXiv 2503.00022)",
    (
        Condition("as it is", ENTRIES, TASKS),
        Condition("question hidden", ENTRIES, TASKS, query_aware=False),
        Condition(
            SHORT,
            SHORT_ENTRIES,
            TASKS,
            why="The window whose queries score the tokens has 8 of them instead of 64: questions have 3 to 14 tokens.",
        ),
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
        *_claims(SHORT, ("kvcrush, window 8", "snapkv, window 8")),
        _whole("as it is", "kvcrush"),
        _whole(SHORT, "kvcrush, window 8"),
    ),
)
