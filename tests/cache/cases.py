"""The methods that the laws run over: every exported part, every named method, and compositions."""

from __future__ import annotations

import dataclasses
import inspect

import kvjax.cache.budget
import kvjax.cache.codec
import kvjax.cache.policy
from kvjax.cache.budget import Budget, Full, Uniform
from kvjax.cache.codec import Codec, Float8, Identity, Integer
from kvjax.cache.layout import ring_slots
from kvjax.cache.method import CacheMethod
from kvjax.cache.methods import parse
from kvjax.cache.policy import AttentionMass, Observation, Policy, Random, Recency

POLICIES: dict[str, Policy] = {
    "recency": Recency(),
    "mass": AttentionMass(),
    "mass-mean": AttentionMass(reduce="mean"),
    "mass-max-normalised": AttentionMass(reduce="max", mean_over_queries=True),
    "observation": Observation(window=8),
    "observation-max": Observation(window=8, kernel=3, pool="max", reduce="max"),
    "random": Random(seed=3),
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
}
BUDGETS: dict[str, Budget] = {
    "full": Full(),
    "tokens": Uniform(tokens_kept=24),
    "share": Uniform(share=0.5),
    "bytes": Uniform(bytes_kept=20000),
}

# Named methods at sizes that bite on 64 tokens; test_laws checks that none is missing.
NAMED = (
    "full",
    "random:tokens=24",
    "streaming_llm:tokens=24",
    "streaming_llm:tokens=24,positions=renumbered",
    "h2o:tokens=24",
    "snapkv:tokens=24,window=8",
    "kivi-4:residual=16,group=16",
    "kivi-2:residual=32",
    "int8",
    "fp8",
    "int4",
    "int3",
    "int2",
)
COMPOSED = (
    "h2o:tokens=24+int4",
    "h2o:tokens=40,recent=0.25+kivi-4:group=8",
    "h2o:share=50%+int8",
    "snapkv:tokens=48,window=8+kivi-2:group=16",
    "snapkv:share=50%,window=8,pool=max+int8:symmetric=true",
    "streaming_llm:tokens=56+kivi-2:group=16",
    "random:share=50%+int2",
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
    }
    for name, codec in CODECS.items():
        methods[f"codec-{name}"] = CacheMethod(keys=codec, values=codec, sinks=1, recent=2)
    return methods


METHODS: dict[str, CacheMethod] = {
    **{spec: parse(spec) for spec in (*NAMED, *COMPOSED)},
    **_built(),
    **_parts(),
}
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
)


def roomy(method: CacheMethod, tokens: int) -> CacheMethod:
    """`method` with a budget that holds `tokens`, everything stored exactly."""
    changes: dict[str, object] = {"keys": Identity(), "values": Identity()}
    if method.budget.evicts:
        changes["budget"] = Uniform(tokens_kept=tokens)
    return dataclasses.replace(method, **changes)


def recent_of(method: CacheMethod, prompt: int, padded: int) -> int:
    """The recent window of a row: a number, or a share of the row's budget."""
    if not isinstance(method.recent, float):
        return method.recent
    return max(1, int(method.recent * budget_of(method, prompt, padded)))


def budget_of(method: CacheMethod, prompt: int, padded: int) -> int:
    """The tokens of a row that are kept: of its own prompt where the budget is a share."""
    return method.budget.tokens(prompt if method.budget.relative else padded)


def always_of(method: CacheMethod, prompt: int, padded: int) -> int:
    """What a row may hold however small its budget: sinks, recent window and, of a share, one block to choose."""
    ring = ring_slots(recent_of(method, prompt, padded), method.block)
    return method.sinks + ring + (method.block if method.budget.relative else 0)
