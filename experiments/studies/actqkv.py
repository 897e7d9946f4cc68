"""Claim: at a fixed budget of reading, a probe that dwells on a window's outstanding queries finds better pages."""

from __future__ import annotations

import dataclasses

from experiments.studies.study import Claim, Condition, Entry, Study
from kvjax.cache import methods

READ, RECENT, PAGE = 128, 64, 16
SIZES = f"tokens={READ},page={PAGE},recent={RECENT}"
WINDOW = dataclasses.replace(
    methods.streaming_llm(tokens=4 + RECENT + READ), name="window", recent=RECENT, prefill="streaming"
)
TASKS = ("kv", "multiquery", "perplexity-prefill")
PAPER = "Long-Bench and InfiniteBench at 2K tokens: +10.4 % over the best other retrieval (second hand)"


def _closer(method: str, against: str, says: str) -> Claim:
    return Claim(says, PAPER, "as it is", "divergence", method, against, "lower")


STUDY = Study(
    "ActQKV (Xiao et al., 2025, arXiv 2502.13542), a reconstruction",
    (
        Condition(
            "as it is",
            (
                Entry("actqkv", f"actqkv:{SIZES}"),
                Entry("mean probe", f"actqkv:{SIZES},probe=mean"),
                Entry("probe by channels", f"actqkv:{SIZES},probe=channels"),
                Entry("uniform cut-off", f"actqkv:{SIZES},cutoff=uniform"),
                Entry("window", WINDOW),
            ),
            TASKS,
            context=1024,
        ),
    ),
    (
        _closer("actqkv", "mean probe", "its probe is closer to the full cache than the mean query"),
        _closer("probe by channels", "mean probe", "so is one that weighs queries by their channels"),
        _closer("actqkv", "uniform cut-off", "a cut-off by density is closer than the same number of pages everywhere"),
        _closer("actqkv", "window", "retrieval is closer than a window that holds as many tokens"),
    ),
)
