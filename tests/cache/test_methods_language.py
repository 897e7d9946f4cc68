"""Named methods, and the language that composes them."""

from __future__ import annotations

import dataclasses

import pytest

from kvjax.cache import methods
from kvjax.cache.budget import Full, Uniform
from kvjax.cache.codec import Identity, Integer
from kvjax.cache.method import CacheMethod
from kvjax.cache.methods import METHODS, combine, parse
from kvjax.cache.policy import AttentionMass, Observation, Random, Recency
from kvjax.errors import UsageError


def unnamed(method: CacheMethod) -> CacheMethod:
    return dataclasses.replace(method, name="")


@pytest.mark.parametrize("name", METHODS)
def test_a_name_is_its_function(name: str) -> None:
    assert unnamed(parse(name)) == unnamed(METHODS[name]())
    assert parse(name).name == name
    assert "Paper:" in (METHODS[name].__doc__ or "")


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("h2o:tokens=256", methods.h2o(tokens=256)),
        ("h2o:share=25%", methods.h2o(share=0.25)),
        ("h2o:share=0.25", methods.h2o()),
        ("h2o:bytes=64KiB", methods.h2o(bytes=65536)),
        ("h2o:bytes=1.5MiB", methods.h2o(bytes=1572864)),
        ("h2o: tokens = 256 , recent = 0.25", methods.h2o(tokens=256, recent=0.25)),
        ("streaming_llm:tokens=64,positions=renumbered", methods.streaming_llm(tokens=64, positions="renumbered")),
        ("snapkv:window=32,kernel=7,pool=max", methods.snapkv(window=32, kernel=7, pool="max")),
        ("random:seed=7,sinks=0", methods.random(seed=7, sinks=0)),
        ("kivi-4:group=64,residual=64", methods.kivi(4, 64, 64)),
        ("int8:symmetric=true", methods.integer(8, symmetric=True)),
    ],
)
def test_options(spec: str, expected: CacheMethod) -> None:
    assert unnamed(parse(spec)) == unnamed(expected)


def test_the_published_points() -> None:
    """The parts that each paper names."""
    h2o, snapkv, kivi = parse("h2o"), parse("snapkv"), parse("kivi-2")
    assert h2o.policy == AttentionMass(reduce="sum") and h2o.recent == 0.5 and h2o.every == 1 and h2o.sinks == 0
    assert snapkv.policy == Observation(window=64, kernel=5, pool="mean") and snapkv.every is None
    assert kivi.budget == Full() and kivi.keys == Integer(bits=2, axis="channel", group=32, symmetric=False)
    assert kivi.values == Integer(bits=2, axis="token", group=32, symmetric=False) and kivi.recent == 128
    streaming = parse("streaming_llm")
    assert streaming.policy == Recency() and streaming.sinks == 4 and streaming.every == 1
    assert parse("random").policy == Random(seed=0) and parse("full") == CacheMethod(name="full")


@pytest.mark.parametrize(("first", "second"), [("snapkv:tokens=256", "int4"), ("h2o", "kivi-2"), ("random", "int8")])
def test_a_sum_evicts_like_one_and_stores_like_the_other(first: str, second: str) -> None:
    method, evicts, stores = parse(f"{first}+{second}"), parse(first), parse(second)
    assert method.name == f"{first}+{second}"
    assert (method.budget, method.policy, method.recent) == (evicts.budget, evicts.policy, evicts.recent)
    assert (method.keys, method.values) == (stores.keys, stores.values)
    assert unnamed(parse(f"{second}+{first}")) == unnamed(method)
    if evicts.every is not None:
        assert method.every is not None and method.every % method.block == 0


def test_full_adds_nothing() -> None:
    assert unnamed(parse("full+int4")) == unnamed(parse("int4"))
    assert unnamed(parse("h2o:tokens=99+full")) == unnamed(parse("h2o:tokens=99"))


def test_combine_refuses_two_of_a_kind() -> None:
    with pytest.raises(UsageError, match="two ways to evict"):
        parse("h2o+snapkv")
    with pytest.raises(UsageError, match="two ways to store"):
        combine(parse("int4"), parse("kivi-2"))
    with pytest.raises(UsageError, match="two ways to store"):
        parse("h2o+int4+int8")


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("h20", "Did you mean 'h2o'"),
        ("snapkv+", "unknown method ''"),
        ("kivi-3", "Did you mean"),
        ("h2o:token=256", "no option 'token'"),
        ("h2o:tokens", "no option 'tokens'"),
        ("full:tokens=3", "options: none"),
        ("h2o:tokens=64.5", "tokens"),
        ("h2o:tokens=many", "tokens"),
        ("h2o:tokens=256,share=50%", "exactly one"),
        ("h2o:share=150%", r"\(0, 1\]"),
        ("h2o:share=0", r"\(0, 1\]"),
        ("h2o:recent=1.5", "below 1"),
        ("h2o:recent=-3", "must not be negative"),
        ("random:sinks=-1", "must not be negative"),
        ("random:seed=1.5", "seed"),
        ("streaming_llm:positions=renumberd", "positions"),
        ("snapkv:pool=median", "pool"),
        ("snapkv:kernel=4", "odd kernel"),
        ("snapkv:window=0", "window"),
        ("kivi-2:group=0", "group"),
        ("kivi-2:group=2.5", "group"),
        ("int4:symmetric=maybe", "symmetric"),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(spec: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        parse(spec)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"recent": 0.5}, "budget that evicts"),
        ({"every": 1}, "needs a budget that evicts"),
        ({"budget": Uniform(tokens_kept=64)}, "recent window of at least 1"),
        ({"budget": Uniform(tokens_kept=64), "policy": Observation(window=16), "recent": 8}, "at least 16"),
        ({"budget": Uniform(tokens_kept=64), "policy": Observation(window=8), "recent": 8, "every": 1}, "every=None"),
        (
            {"budget": Uniform(tokens_kept=64), "policy": Observation(window=8), "recent": 8, "prefill": "streaming"},
            "prefill='exact'",
        ),
        ({"budget": Uniform(tokens_kept=64), "recent": 8, "every": 0}, "every=0"),
        (
            {
                "budget": Uniform(tokens_kept=64),
                "recent": 8,
                "every": 8,
                "keys": Integer(bits=4, axis="channel", group=16, symmetric=False),
            },
            "multiple of the codecs' block of 16",
        ),
        ({"positions": "relative"}, "positions"),
        ({"prefill": "lazy"}, "prefill"),
        ({"sinks": -1}, "must not be negative"),
    ],
)
def test_parts_that_do_not_fit_are_refused(fields: dict[str, object], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        CacheMethod(name="mine", **fields)


def test_messages_name_the_method() -> None:
    with pytest.raises(UsageError, match="'mine'"):
        CacheMethod(name="mine", every=1)


def test_identity_is_the_default() -> None:
    assert CacheMethod().keys == Identity() and CacheMethod().block == 1
