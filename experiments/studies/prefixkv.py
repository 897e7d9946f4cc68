"""Claim: layers that keep the same part of their attention lose less than layers of equal or of falling size.

All three keep the tokens with the most attention over all queries and heads; only the sizes of layers differ. What is
measured is the divergence from the full cache, over lookups and continuations of text. (The paper's perplexity is of
answers that the full model gave, the same question asked in another way.)

In the model as it is, the claim did not come back: equal and falling sizes are closer at every budget, but no interval
excludes zero. Its three layers have no lazy one among them. The first attends widely, to the token before, and gets 47
to 68 % of the places for that, at the expense of the second, where lookups happen: much attention is not much use.

With three lazy layers on top, as large models have many, the claim held against equal sizes at 20 % and against the
pyramid at 50 %; the other four differences cannot be told from zero, for at 10 % nothing is found by anybody, and the
layers which the pyramid starves are the same. The lazy layers keep the least that calibration gives a layer, 1 %.

All of it is of one set of tokens per layer, as in the paper. With a set per kv head, an earlier run, less was lost at
most sizes and more could be told: as it is, uniform was closer at 10 and 50 % and the pyramid at 10 %; with lazy layers
the claim held against uniform at all three budgets, and against the pyramid at 50 %.
"""

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
OTHERS = (*sized("uniform", *PAPER, method=UNIFORM), *sized("pyramid", *PAPER, method=PYRAMID))
TASKS = ("kv", "perplexity-prefill")
LAZY = "lazy layers"


def _prefix() -> tuple[Entry, ...]:
    return tuple(Entry(at("prefix", s), dataclasses.replace(BASE, budget=Prefix(share=s)), s) for s in PAPER)


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
        Condition("as it is", (*_prefix(), *OTHERS), TASKS),
        Condition(
            LAZY,
            (*_prefix(), *OTHERS),
            TASKS,
            model=lazy_layers,
            why="Three layers more, on top, that attend to the first token alone and add nothing.",
        ),
    ),
    tuple(_closer(rival, size, condition) for condition in ("as it is", LAZY) for rival in RIVALS for size in PAPER),
)
