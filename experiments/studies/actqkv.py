"""Claim: at a fixed budget of reading, a probe that dwells on a window's outstanding queries finds better pages.

The method here is a reconstruction from the paper's abstract; its equations are not verified, and its number is
second hand. A prompt of 992 tokens is read in chunks of 256, each of which attends to itself, 4 sinks, a recent
window of 64 and 8 pages of 16 that its probe finds; then every token is its own probe, so that probes differ in the
prompt alone. Questions are the end of the last chunk.

Retrieval itself came back: it is far closer to the full cache than a window that holds as many tokens (though not in
the perplexity of text, to which the recent tokens matter most). Which probe retrieves cannot be shown: three ways to
weigh 256 queries of this model give the same answers, and differ by at most 0.05 nats of 2.9. Windows of 16 tokens, of
which the question is most, do not bring it out either: 0.006 nats of 3. So it is not that a question drowns in its
window; decoded tokens, which probe for themselves, may find what they need whatever the prompt's windows had read.

That layers with denser information may read less did not come back: the same number of pages everywhere is closer by
0.5 nats. A likely reason, not measured: of three layers one retrieves, and peaked scores, which it has because it does,
count as dense.
"""

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


SHORT, WINDOWS = 16, "short windows"


def _closer(method: str, against: str, says: str, condition: str = "as it is") -> Claim:
    return Claim(f"{condition}: {says}", PAPER, condition, "divergence", method, against, "lower")


ENTRIES = (
    Entry("actqkv", f"actqkv:{SIZES}"),
    Entry("mean probe", f"actqkv:{SIZES},probe=mean"),
    Entry("probe by channels", f"actqkv:{SIZES},probe=channels"),
    Entry("uniform cut-off", f"actqkv:{SIZES},cutoff=uniform"),
    Entry("window", WINDOW),
)

STUDY = Study(
    "ActQKV (Xiao et al., 2025, arXiv 2502.13542), a reconstruction",
    (
        Condition("as it is", ENTRIES, TASKS, context=1024),
        Condition(
            WINDOWS,
            ENTRIES,
            TASKS,
            context=1024,
            chunk=SHORT,
            why=f"Windows of {SHORT} tokens: the question is most of the last one, so there is something to dwell on.",
        ),
    ),
    (
        _closer("actqkv", "mean probe", "its probe is closer to the full cache than the mean query"),
        _closer("probe by channels", "mean probe", "so is one that weighs queries by their channels"),
        _closer("actqkv", "uniform cut-off", "a cut-off by density is closer than the same number of pages everywhere"),
        _closer("actqkv", "window", "retrieval is closer than a window that holds as many tokens"),
        _closer("actqkv", "mean probe", "its probe is closer to the full cache than the mean query", WINDOWS),
        _closer("probe by channels", "mean probe", "so is one that weighs queries by their channels", WINDOWS),
        _closer("actqkv", "uniform cut-off", "a cut-off by density is closer than one everywhere alike", WINDOWS),
        _closer("actqkv", "window", "retrieval is closer than a window that holds as many tokens", WINDOWS),
    ),
)
