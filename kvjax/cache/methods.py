"""Named methods: published points of the algebra, and the little language that composes them.

`parse("snapkv:tokens=256+int4")` is SnapKV at 256 tokens whose body is stored in 4 bits. Each name is a function that
can be called from Python with the same options: `methods.snapkv(tokens=256)`.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable
from typing import Literal

from kvjax.cache.budget import Uniform
from kvjax.cache.codec import Float8, Identity, Integer
from kvjax.cache.layout import ceil_to
from kvjax.cache.method import CacheMethod
from kvjax.cache.policy import AttentionMass, Observation, Random, Recency
from kvjax.errors import UsageError, unknown

DEFAULT_SHARE = 0.25


def _uniform(tokens: int | None, share: float | None, bytes: int | None) -> Uniform:
    if tokens is None and share is None and bytes is None:
        share = DEFAULT_SHARE
    return Uniform(tokens_kept=tokens, share=share, bytes_kept=bytes)


def full() -> CacheMethod:
    """Every token, exactly: the reference of every comparison.

    Paper: none.
    """
    return CacheMethod(name="full")


def random(
    tokens: int | None = None, share: float | None = None, bytes: int | None = None, sinks: int = 4, seed: int = 0
) -> CacheMethod:
    """Random tokens of the prompt, besides sinks and a recent window of a quarter of the budget.

    Paper: none; the floor that an eviction method has to beat. Decoded tokens are kept.
    """
    return CacheMethod(
        name="random", budget=_uniform(tokens, share, bytes), policy=Random(seed=seed), sinks=sinks, recent=0.25
    )


def streaming_llm(
    tokens: int | None = None,
    share: float | None = None,
    bytes: int | None = None,
    sinks: int = 4,
    positions: Literal["original", "renumbered"] = "original",
) -> CacheMethod:
    """Sinks and the newest tokens; all that leaves the window is forgotten, also while decoding.

    Paper: Xiao et al., 2023, "Efficient Streaming Language Models with Attention Sinks" (arXiv 2309.17453). The paper
    renumbers positions inside the cache (`positions=renumbered`); most comparisons keep the original ones (default).
    """
    return CacheMethod(
        name="streaming_llm",
        budget=_uniform(tokens, share, bytes),
        policy=Recency(),
        sinks=sinks,
        recent=0.25,
        every=1,
        positions=positions,
    )


def h2o(
    tokens: int | None = None, share: float | None = None, bytes: int | None = None, recent: float = 0.5
) -> CacheMethod:
    """Half the budget for recent tokens, half for those with the most accumulated attention, at every step.

    Paper: Zhang et al., 2023, "H2O: Heavy-Hitter Oracle" (arXiv 2306.14048), algorithm 1. Attention is summed over all
    queries and over the query heads of a kv head.
    """
    return CacheMethod(
        name="h2o", budget=_uniform(tokens, share, bytes), policy=AttentionMass(), recent=recent, every=1
    )


def snapkv(
    tokens: int | None = None,
    share: float | None = None,
    bytes: int | None = None,
    window: int = 64,
    kernel: int = 5,
    pool: Literal["mean", "max"] = "mean",
) -> CacheMethod:
    """What the prompt's last queries attend to, pooled over neighbours; once, at the end of the prompt.

    Paper: Li et al., 2024, "SnapKV" (arXiv 2404.14469), section 4. Decoded tokens are kept.
    """
    return CacheMethod(
        name="snapkv",
        budget=_uniform(tokens, share, bytes),
        policy=Observation(window=window, kernel=kernel, pool=pool),
        recent=window,
    )


def kivi(bits: Literal[8, 4, 3, 2] = 2, group: int = 32, residual: int = 128) -> CacheMethod:
    """Keys per channel over token groups, values per token over channel groups, recent tokens exact.

    Paper: Liu et al., 2024, "KIVI" (arXiv 2402.02750), section 3. Asymmetric, with a scale and a zero point of 16 bits
    per group. Keys and values leave the recent window together, a group of tokens at a time (the release slides the
    values one by one); the window holds `residual` to `residual + group - 1` tokens.
    """
    return CacheMethod(
        name=f"kivi-{bits}",
        keys=Integer(bits=bits, axis="channel", group=group),
        values=Integer(bits=bits, axis="token", group=group),
        recent=residual,
    )


def integer(bits: Literal[8, 4, 3, 2] = 8, group: int | None = None, symmetric: bool = False) -> CacheMethod:
    """Every token in integers, per token and head (or per `group` channels), nothing exact but the current token.

    Paper: none in particular; what serving engines call per-token-head quantisation.
    """
    codec = Integer(bits=bits, axis="token", group=group, symmetric=symmetric)
    return CacheMethod(name=f"int{bits}", keys=codec, values=codec)


def fp8(format: Literal["e4m3", "e5m2"] = "e4m3", scale: Literal["token", "none"] = "token") -> CacheMethod:
    """Every token in floating numbers of 8 bits, nothing exact but the current token.

    Paper: Micikevicius et al., 2022, "FP8 Formats for Deep Learning" (arXiv 2209.05433) has the formats. Each token and
    head has a scale; with `scale=none` magnitudes beyond 448 (e4m3) or 57344 (e5m2) saturate.
    """
    codec = Float8(format=format, scale=scale)
    return CacheMethod(name="fp8", keys=codec, values=codec)


def kivi_4(group: int = 32, residual: int = 128) -> CacheMethod:
    return kivi(4, group, residual)


def kivi_2(group: int = 32, residual: int = 128) -> CacheMethod:
    return kivi(2, group, residual)


def int8(group: int | None = None, symmetric: bool = False) -> CacheMethod:
    return integer(8, group, symmetric)


def int4(group: int | None = 32, symmetric: bool = False) -> CacheMethod:
    return integer(4, group, symmetric)


def int3(group: int | None = 32, symmetric: bool = False) -> CacheMethod:
    return integer(3, group, symmetric)


def int2(group: int | None = 32, symmetric: bool = False) -> CacheMethod:
    return integer(2, group, symmetric)


kivi_4.__doc__ = kivi_2.__doc__ = kivi.__doc__
int8.__doc__ = int4.__doc__ = int3.__doc__ = int2.__doc__ = integer.__doc__

METHODS: dict[str, Callable[..., CacheMethod]] = {
    "full": full,
    "random": random,
    "streaming_llm": streaming_llm,
    "h2o": h2o,
    "snapkv": snapkv,
    "kivi-4": kivi_4,
    "kivi-2": kivi_2,
    "int8": int8,
    "fp8": fp8,
    "int4": int4,
    "int3": int3,
    "int2": int2,
}


def parse(spec: str) -> CacheMethod:
    """A method from its name: `name[:option=value[,option=value]][+name...]`.

    Values are numbers, shares ("25%"), sizes ("64KiB"), or words.

    Raises:
      UsageError: an unknown name or option, or parts that cannot be combined; says which and what is known.
    """
    parts = [_build(part.strip()) for part in spec.split("+")]
    method = parts[0]
    for other in parts[1:]:
        method = combine(method, other)
    return dataclasses.replace(method, name=spec)


def combine(first: CacheMethod, second: CacheMethod) -> CacheMethod:
    """One method that evicts like one of the two and stores like the other.

    Raises:
      UsageError: both evict, or both code.
    """
    name = f"{first.name}+{second.name}"
    if first.budget.evicts and second.budget.evicts:
        raise UsageError(f"{name!r} names two ways to evict; a method has one budget and one policy")
    coded = [m for m in (first, second) if (m.keys, m.values) != (Identity(), Identity())]
    if len(coded) == 2:
        raise UsageError(f"{name!r} names two ways to store tokens; a method has one codec for keys and one for values")
    base = second if second.budget.evicts else first
    other = first if base is second else second
    codec = coded[0] if coded else base
    combined = {"keys": codec.keys, "values": codec.values, "sinks": max(base.sinks, other.sinks), "name": name}
    if not base.budget.evicts:
        combined["recent"] = max(base.recent, other.recent)
    if base.every is not None:
        combined["every"] = ceil_to(base.every, codec.block)
    return dataclasses.replace(base, **combined)


def _build(part: str) -> CacheMethod:
    name, _, options = part.partition(":")
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    build = METHODS[name]
    known = inspect.signature(build).parameters
    given: dict[str, int | float | bool | str] = {}
    for option in filter(None, options.split(",")):
        key, equals, value = (x.strip() for x in option.partition("="))
        if key not in known or not equals:
            example = f"{name}:{next(iter(known))}=…" if known else name
            raise UsageError(
                f"method {name!r} has no option {key!r} (options: {', '.join(known) or 'none'}; written {example})"
            )
        given[key] = _value(value)
    try:
        return build(**given)
    except TypeError as error:
        raise UsageError(f"method {part!r}: {error}") from error


_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMG])i?B", re.IGNORECASE)


def _value(text: str) -> int | float | bool | str:
    if size := _SIZE.fullmatch(text):
        return int(float(size[1]) * 1024 ** (1 + "KMG".index(size[2].upper())))
    if share := re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", text):
        return float(share[1]) / 100
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
