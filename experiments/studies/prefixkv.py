"""Claim: layers that keep the same part of their attention lose less than layers of equal or of falling size."""

from __future__ import annotations

import dataclasses

from experiments.studies.planted import lazy_layers
from experiments.studies.study import Claim, Condition, Entry, Study, at, sized
from kvjax.cache import methods
from kvjax.cache.budget import Prefix, Pyramid, Uniform

#: Perplexity of LLaVA-1.5-7B, MM-Vet, by size: PrefixKV, uniform, pyramid.
PAPER = {0.1: ("7.38", "41.8", "20.8"), 0.2: ("5.97", "26.6", "10.4"), 0.5: ("–", "11.8", "5.63")}
RIVALS = ("uniform", "pyramid")
BASE = methods.prefixkv()
UNIFORM = dataclasses.replace(BASE, budget=Uniform(share=0.5))
PYRAMID = dataclasses.replace(BASE, budget=Pyramid(share=0.5))
ENTRIES = (
    *(Entry(at("prefix", s), dataclasses.replace(BASE, budget=Prefix(share=s)), s) for s in PAPER),
    *sized("uniform", *PAPER, method=UNIFORM),
    *sized("pyramid", *PAPER, method=PYRAMID),
)
TASKS = ("kv", "perplexity-prefill")
LAZY = "lazy layers"


def _closer(rival: str, size: float, condition: str) -> Claim:
    ours, *theirs = PAPER[size]
    return Claim(
        f"{condition}, {100 * size:.0f} % of the memory: prefix is closer to the full cache than {rival}",
        f"LLaVA-1.5-7B, MM-Vet, perplexity: {ours} against {theirs[RIVALS.index(rival)]}; full 5.28",
        condition,
        "divergence",
        at("prefix", size),
        at(rival, size),
        "lower",
    )


STUDY = Study(
    "PrefixKV (Wang et al., 2024, arXiv 2412.03409)",
    (
        Condition("as it is", ENTRIES, TASKS),
        Condition(
            LAZY,
            ENTRIES,
            TASKS,
            model=lazy_layers,
            why="Three layers more, on top, that attend to the first token alone and add nothing.",
        ),
    ),
    tuple(_closer(rival, size, condition) for condition in ("as it is", LAZY) for rival in RIVALS for size in PAPER),
)
