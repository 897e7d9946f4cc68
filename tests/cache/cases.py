"""The methods that the laws run over: every exported part, every named method, and compositions."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from typing import Any

import pytest

import kvjax.cache.budget
import kvjax.cache.codec
import kvjax.cache.fate
import kvjax.cache.policy
import kvjax.cache.selector
from kvjax.cache.budget import (
    AdaptiveHeads,
    Budget,
    Full,
    HeadTable,
    LayerTable,
    Prefix,
    Pyramid,
    Uniform,
)
from kvjax.cache.codec import (
    QJL,
    Balanced,
    ByLayer,
    ChannelSubset,
    Codec,
    Fixed,
    Float8,
    Identity,
    Integer,
    LloydMax,
    LowRank,
    NonUniform,
    PerChannel,
    Polar,
    PolarPairs,
    Rotated,
    Sketched,
)
from kvjax.cache.fate import Compensate, Demote, Drop, Fate, Merge, Represent
from kvjax.cache.method import CacheMethod
from kvjax.cache.methods import parse
from kvjax.cache.policy import (
    AttentionMass,
    Chunks,
    Critical,
    ExpectedAttention,
    FixedPlace,
    Frozen,
    Given,
    Hidden,
    KeyDiff,
    Keyformer,
    KeyNorm,
    Lag,
    LastAttention,
    Observation,
    OverHeads,
    Policy,
    Predicted,
    Random,
    Recency,
    Redundancy,
)
from kvjax.cache.selector import ProbedPages, ReadAll, Selector, TopPages, TopValues

POLICIES: dict[str, Policy] = {
    "recency": Recency(),
    "mass": AttentionMass(),
    "mass-mean": AttentionMass(reduce="mean"),
    "mass-max-normalised": AttentionMass(reduce="max", mean_over_queries=True),
    "observation": Observation(window=8),
    "observation-max": Observation(window=8, kernel=3, pool="max", reduce="max"),
    "random": Random(seed=3),
    "key-norm": KeyNorm(),
    "key-diff": KeyDiff(),
    "lag": Lag(lag=8),
    "last-attention": LastAttention(),
    "over-heads": OverHeads(KeyDiff()),
    "chunks": Chunks(Observation(window=8), size=5),
    "critical": Critical(Observation(window=8)),
    "expected-attention": ExpectedAttention(ahead=16),
    "keyformer": Keyformer(steps=8, seed=1),
    "fixed-place": FixedPlace(KeyNorm(), distance=5),
    "frozen": Frozen(Keyformer(seed=1)),
    "redundancy": Redundancy(window=4, kernel=3, threshold=0.2),
    "predicted": Predicted(hidden=8),
    "given": Given(),
    "hidden": Hidden(),
}
CODECS: dict[str, Codec] = {
    "identity": Identity(),
    "int8": Integer(bits=8, axis="token", group=None, symmetric=False),
    "int4-symmetric": Integer(bits=4, axis="token", group=16, symmetric=True),
    "fp8": Float8(format="e4m3", scale="token"),
    "int3": Integer(bits=3, axis="token", group=16, symmetric=False),
    "int2": Integer(bits=2, axis="token", group=32, symmetric=False),
    "int4-channel": Integer(bits=4, axis="channel", group=8, symmetric=False),
    "int2-channel-symmetric": Integer(bits=2, axis="channel", group=16, symmetric=True),
    "fixed": Fixed(bits=4),
    "int8-static": PerChannel(Fixed(bits=8)),
    "fp8-static": PerChannel(Float8(format="e4m3", scale="none")),
    "balanced": Balanced(Integer(bits=2, axis="token", group=16)),
    "subset": ChannelSubset(Integer(bits=4, axis="token", group=8), share=0.5, window=8),
    "non-uniform-channel": NonUniform(bits=3, axis="channel"),
    "non-uniform-token": NonUniform(bits=4, axis="token", outliers=0.05, span="head"),
    "low-rank": LowRank(share=0.5, window=8),
    "low-rank-int4": LowRank(Integer(bits=4, axis="channel", group=8), share=0.75, window=8),
    "lloyd-max": LloydMax(bits=2),
    "rotated": Rotated(LloydMax(bits=3)),
    "sketched": Sketched(Rotated(LloydMax(bits=1))),
    "qjl": QJL(bits=2, outliers=0),
    "qjl-outliers": QJL(bits=2, outliers=4, group=8),
    "polar": Polar(levels=3),
    "polar-pairs": PolarPairs(radius_bits=4, angle_bits=2, group=8),
    "by-layer": ByLayer((Integer(bits=4, axis="token", group=16), Integer(bits=8))),
}
BUDGETS: dict[str, Budget] = {
    "full": Full(),
    "tokens": Uniform(tokens_kept=24),
    "share": Uniform(share=0.5),
    "bytes": Uniform(bytes_kept=20000),
    "pyramid": Pyramid(tokens_kept=24, beta=4.0),
    "prefix": Prefix(share=0.4),
    "by-layer": LayerTable((Uniform(tokens_kept=24), Full()), table=(0,)),
    "by-head": HeadTable((Full(), Uniform(tokens_kept=24)), table=((1, 0),)),
    "heads": AdaptiveHeads(tokens_kept=24),
}

FATES: dict[str, Fate] = {
    "drop": Drop(),
    "demote": Demote(keys=Integer(bits=2, group=16), values=Integer(bits=2, group=16)),
    "compensate": Compensate(),
    "represent": Represent(share=0.5),
    "merge": Merge(following=4, seed=2),
}

SELECTORS: dict[str, Selector] = {
    "all": ReadAll(),
    "top-pages": TopPages(tokens=16, size=8),
    "probed-pages": ProbedPages(tokens=16, size=8),
    "top-values": TopValues(count=8),
}

# Named methods at sizes that bite on 64 tokens; test_laws checks that none is missing.
NAMED = (
    "full",
    "random:tokens=24",
    "streaming_llm:tokens=24",
    "streaming_llm:tokens=24,positions=renumbered",
    "h2o:tokens=24",
    "snapkv:tokens=24,window=8",
    "knorm:tokens=24",
    "keydiff:tokens=24",
    "lagkv:tokens=24,lag=8",
    "tova:tokens=24",
    "keyformer:tokens=24",
    "keyformer_released:tokens=24",
    "rkv:tokens=24,every=8",
    "kvzap:tokens=24,recent=8",
    "pyramidkv:tokens=24,window=8",
    "chunkkv:tokens=24,window=8,size=4",
    "criticalkv:tokens=24,window=8",
    "expected_attention:tokens=24",
    "kvzip:tokens=24",
    "kvzip:tokens=24,recent=4,together=false",
    "adakv:tokens=24,window=8",
    "mikv:tokens=24",
    "quest:tokens=32,page=8",
    "actqkv:tokens=16,page=8,recent=8",
    "top_values:count=16",
    "cam:tokens=24,following=4",
    "kvcrush:tokens=24,window=8",
    "prefixkv:tokens=24",
    "prefixkv:tokens=24,decoded=importance",
    "prefixkv:tokens=24,decoded=positional,distance=9",
    "razor:local=16",
    "duo_attention:recent=16,sinks=4",
    "simlayerkv:recent=16",
    "kivi-4:residual=16,group=16",
    "kivi-2:residual=32",
    "kivi_released:residual=16,group=8",
    "int8",
    "fp8",
    "int4",
    "int3",
    "int2",
    "kvquant-4",
    "kvquant-3:outliers=0.05",
    "kvquant-2:span=head",
    "turboquant-4",
    "turboquant-3",
    "turboquant-2",
    "turboquant_prod-4",
    "turboquant_prod-3",
    "turboquant_prod-2",
    "qjl:residual=16,group=16,outliers=4",
    "polarquant",
    "polarquant_pairs:group=16",
    "int8_channel",
    "fp8_channel",
    "think:window=8,recent=8",
    "cskv:window=16",
    "cskv:window=16,bits=4",
    "kvtuner:table=k8v4-k4v2",
    "kvtuner:table=k4v2,mode=token",
)
COMPOSED = (
    "h2o:tokens=24+int4",
    "h2o:tokens=40,recent=0.25+kivi-4:group=8",
    "h2o:share=50%+int8",
    "snapkv:tokens=48,window=8+kivi-2:group=16",
    "snapkv:share=50%,window=8,pool=max+int8:symmetric=true",
    "streaming_llm:tokens=56+kivi-2:group=16",
    "random:share=50%+int2",
    "tova:share=50%+int4",
    "keydiff:tokens=40,recent=8+kivi-4:group=8",
    "keyformer:share=50%+int8",
    "snapkv:tokens=40,window=8+turboquant-3",
    "h2o:tokens=40,recent=0.25+int8_channel",
    "streaming_llm:tokens=40+kvquant-4",
    "snapkv:share=50%,window=8+think:recent=8,window=8",
    "actqkv:tokens=16,page=16,recent=8,prefill=exact,probe=channels+kvquant-4:span=head",
)


def _built() -> dict[str, CacheMethod]:
    tight = Uniform(tokens_kept=24)
    coded = Integer(bits=4, axis="channel", group=8, symmetric=False)
    return {
        "streaming-prefill-h2o": CacheMethod(
            budget=tight, policy=AttentionMass(), sinks=2, recent=8, prefill="streaming", every=1
        ),
        "streaming-prefill-h2o-blocks": CacheMethod(
            budget=Uniform(tokens_kept=48), policy=AttentionMass(), keys=coded, recent=8, prefill="streaming", every=16
        ),
        "streaming-prefill-random": CacheMethod(budget=tight, policy=Random(), sinks=2, recent=4, prefill="streaming"),
        "streaming-prefill-kivi": CacheMethod(keys=coded, recent=8, sinks=2, prefill="streaming"),
        "streaming-prefill-renumbered": CacheMethod(
            budget=tight, sinks=4, recent=8, prefill="streaming", every=1, positions="renumbered"
        ),
        "every-4": CacheMethod(budget=tight, policy=AttentionMass(), sinks=2, recent=8, every=4),
        "every-16-blocks": CacheMethod(
            budget=Uniform(tokens_kept=48),
            policy=AttentionMass(),
            keys=coded,
            values=coded,
            sinks=2,
            recent=8,
            every=16,
        ),
        "streaming-prefill-keydiff": CacheMethod(
            budget=tight, policy=KeyDiff(), sinks=2, recent=4, prefill="streaming", every=1
        ),
        "streaming-prefill-keyformer": CacheMethod(
            budget=tight, policy=Keyformer(), sinks=2, recent=4, prefill="streaming", every=1
        ),
        "every-8-redundancy-blocks": CacheMethod(
            budget=Uniform(tokens_kept=48), policy=Redundancy(), keys=coded, recent=8, every=16
        ),
        "renumbered-h2o": CacheMethod(budget=tight, policy=AttentionMass(), recent=8, every=1, positions="renumbered"),
        "observation-sinks": CacheMethod(budget=tight, policy=Observation(window=4, kernel=3), sinks=3, recent=6),
    }


def _parts() -> dict[str, CacheMethod]:
    """Every policy and every codec by itself."""
    methods = {
        f"policy-{name}": CacheMethod(
            budget=Uniform(tokens_kept=24), policy=policy, sinks=2, recent=8, every=1 if policy.online else None
        )
        for name, policy in POLICIES.items()
        if not policy.needs_hiding  # tests/cache/test_hiding.py: these need selective attention
    }
    for name, fate in FATES.items():
        methods[f"fate-{name}"] = CacheMethod(
            budget=Uniform(tokens_kept=24), policy=AttentionMass(), fate=fate, sinks=2, recent=8, every=4
        )
    methods["fate-demote-blocks"] = CacheMethod(
        budget=Uniform(tokens_kept=48),
        policy=AttentionMass(),
        fate=Demote(Integer(bits=2, axis="channel", group=8), Integer(bits=2, group=16)),
        recent=8,
        every=8,
    )
    for name in ("prefix", "by-layer", "by-head", "heads"):
        methods[f"budget-{name}"] = CacheMethod(
            budget=BUDGETS[name], policy=Observation(window=8), values=Integer(bits=8), sinks=2, recent=8
        )
    for name, selector in SELECTORS.items():
        methods[f"selector-{name}"] = CacheMethod(selector=selector, sinks=2, recent=8, values=Integer(bits=8))
    for name, codec in CODECS.items():
        methods[f"codec-{name}"] = CacheMethod(keys=codec, values=codec, sinks=1, recent=2)
    return methods


METHODS: dict[str, CacheMethod] = {
    **{spec: parse(spec) for spec in (*NAMED, *COMPOSED)},
    **_built(),
    **_parts(),
}
# Every part, and one named method of each kind, obeys the laws in the quick tests; the slow ones take them all.
QUICK = re.compile(
    r"(full|random|h2o|snapkv|keydiff|tova|keyformer|rkv|quest|actqkv|kivi-4|kivi_released|kvquant-4|turboquant_prod-4|"
    r"qjl|int8_channel|think|cskv:window=16|kvzap|lagkv|expected_attention)(:[^+]*)?$|"
    r"h2o:tokens=24.int4$|streaming-|every-|renumbered-|fate-|budget-|selector-(top|probed)|"
    r"policy-(recency|mass-max|observation$)|codec-(fixed|non-uniform-token|qjl-outliers)"
)
SLOW = {name for name in METHODS if not QUICK.match(name)} | {"cskv:window=16,bits=4"}


def most(names: Iterable[str]) -> list[Any]:
    """The names as parameters of a test; those of `SLOW` are marked."""
    return [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in names]


EVICTING = {name: method for name, method in METHODS.items() if method.budget.evicts}
ONLINE = {name: method for name, method in EVICTING.items() if method.every is not None}


def exported(module: object, base: type) -> set[str]:
    """Names of the concrete subclasses of `base` that a module makes public."""
    names = getattr(module, "__all__", None) or [name for name in vars(module) if not name.startswith("_")]
    classes = {name: getattr(module, name) for name in names}
    return {n for n, c in classes.items() if inspect.isclass(c) and issubclass(c, base) and not inspect.isabstract(c)}


def covered(samples: dict[str, Budget] | dict[str, Policy] | dict[str, Codec]) -> set[str]:
    """Names of the classes that the samples are of."""
    return {type(sample).__name__ for sample in samples.values()}


PARTS = (
    (kvjax.cache.policy, Policy, POLICIES),
    (kvjax.cache.codec, Codec, CODECS),
    (kvjax.cache.budget, Budget, BUDGETS),
    (kvjax.cache.fate, Fate, FATES),
    (kvjax.cache.selector, Selector, SELECTORS),
)
