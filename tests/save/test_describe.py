"""Methods survive JSON, and JSON that is not a method is refused by name."""

from __future__ import annotations

import dataclasses
import json

import pytest

from kvjax.cache.codec import Codec, Integer
from kvjax.cache.describe import PARTS, from_json, register, to_json
from kvjax.cache.layout import CacheDims
from kvjax.cache.method import CacheMethod
from kvjax.cache.methods import parse
from kvjax.cache.policy import Repetition
from kvjax.errors import UsageError
from tests.cache.cases import METHODS, covered
from tests.cache.cases import PARTS as SAMPLES

DESCRIBED = to_json(parse("h2o:tokens=24+int4"))


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
def test_every_method_comes_back(method: CacheMethod) -> None:
    back = from_json(json.loads(json.dumps(to_json(method))), CacheMethod)
    assert back == method and hash(back) == hash(method) and repr(back) == repr(method)


def test_every_exported_part_comes_back() -> None:
    samples = [sample for _, _, parts in SAMPLES for sample in parts.values()]
    for part in (*samples, CacheDims(1, 2, 4, 8, 32, 16, window=5), Repetition(chunk=7)):
        assert from_json(json.loads(json.dumps(to_json(part))), type(part)) == part
    known = set().union(*(covered(parts) for _, _, parts in SAMPLES))
    assert known | {"CacheMethod", "CacheDims", "Repetition"} == PARTS.keys()


def changed(**fields: object) -> dict:
    return {**DESCRIBED, **fields}


@pytest.mark.parametrize(
    ("described", "message"),
    [
        (None, "expected a CacheMethod"),
        ([], "expected a CacheMethod"),
        (changed(part="os.system"), "unknown part 'os.system'"),
        (changed(part=["CacheMethod"]), "unknown part"),
        (changed(policy={"part": "AtentionMass"}), "Did you mean 'AttentionMass'"),
        (changed(policy={"part": "Full"}), "expected a Policy, got the part 'Full'"),
        (changed(keys=DESCRIBED["policy"]), "expected a Codec"),
        (changed(policy={"part": "Policy"}), "unknown part 'Policy'"),
        (changed(sink=4), "no field 'sink'. Did you mean 'sinks'"),
        (changed(sinks="4"), "CacheMethod.sinks must be int, got '4'"),
        (changed(sinks=True), "CacheMethod.sinks must be int, got True"),
        (changed(prefill="none"), "CacheMethod.prefill must be"),
        (changed(name=None), "CacheMethod.name must be str"),
        (changed(every=[1]), "CacheMethod.every must be"),
        (changed(budget=7), "CacheMethod.budget must be Budget"),
        (changed(sinks=-1), "negative"),
        (changed(keys={"part": "Integer", "bits": "4"}), "Integer.bits must be"),
        (changed(keys={"part": "Integer", "axis": "row"}), "Integer.axis must be"),
        (changed(budget={"part": "Uniform", "tokens_kept": 1, "share": 0.5}), "exactly one"),
    ],
)
def test_what_is_not_a_method_is_refused_by_name(described: object, message: str) -> None:
    with pytest.raises(UsageError) as error:
        from_json(described, CacheMethod)
    assert message in str(error.value)


def test_a_missing_field_takes_its_default_and_is_named_where_it_has_none() -> None:
    assert from_json({"part": "CacheMethod"}, CacheMethod) == CacheMethod()
    with pytest.raises(UsageError, match=r"CacheDims cannot be made.*kv_heads"):
        from_json({"part": "CacheDims", "batch": 1}, CacheDims)


def test_long_values_do_not_fill_the_screen() -> None:
    for described in (changed(name=["x" * 9999]), changed(part="x" * 9999), changed(**{"x" * 9999: 1})):
        with pytest.raises(UsageError) as error:
            from_json(described, CacheMethod)
        assert len(str(error.value)) < 1000


def test_values_that_json_cannot_hold_are_refused_when_described() -> None:
    @dataclasses.dataclass(frozen=True)
    class Table(Integer):
        entries: tuple[int, ...] = ()

    with pytest.raises(UsageError, match="not a part that kvjax knows"):
        to_json(Table(entries=(1, 2)))
    try:
        register(Table)
        assert from_json(to_json(Table(entries=(1, 2))), Codec) == Table(entries=(1, 2))
        with pytest.raises(UsageError, match=r"Table\.entries must be int"):
            to_json(Table(entries=(1, 0.5)))  # type: ignore[arg-type]
    finally:
        PARTS.pop("Table")


def test_two_parts_cannot_share_a_name() -> None:
    @dataclasses.dataclass(frozen=True)
    class Random(Integer):
        pass

    with pytest.raises(UsageError, match="a part named 'Random' exists"):
        register(Random)
