from __future__ import annotations

import dataclasses

import pytest

from kvjax.cache import methods
from kvjax.cache.budget import Uniform
from kvjax.cache.method import CacheMethod
from kvjax.cache.plan import layer_bytes
from kvjax.errors import UsageError
from kvjax.evaluation.contender import CommonBudget, contenders
from kvjax.evaluation.setting import Setting

SETTING = Setting(context=256, room=32, batch=2)


def named(spec: str):
    return next(c for c in contenders([spec]) if c.name == spec)


def test_baselines_are_added_once_and_come_first():
    assert [c.name for c in contenders(["int4", "full", "random:share=50%"])] == [
        "full",
        "random:share=50%",
        "streaming_llm",
        "int4",
    ]
    assert [c.name for c in contenders(["random+int4"])][:3] == ["full", "random", "streaming_llm"]


def test_one_method_named_twice_is_one_row():
    assert [c.name for c in contenders(["int4", "int4"])][3:] == ["int4"]


def test_two_methods_of_one_name_are_refused():
    with pytest.raises(UsageError, match="'custom'"):
        contenders([CacheMethod(sinks=1), CacheMethod(sinks=2)])


@pytest.mark.parametrize(("name", "near"), [("snapvk", "snapkv"), ("int5", "int4")])
def test_unknown_methods_name_the_nearest(name, near):
    with pytest.raises(UsageError, match=near):
        contenders([name])


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("48", CommonBudget(tokens=48)),
        ("25%", CommonBudget(share=0.25)),
        ("64KiB", CommonBudget(bytes=65536)),
        ("1.5MB", CommonBudget(bytes=1572864)),
        ("int4", CommonBudget(like=methods.parse("int4"))),
    ],
)
def test_budgets_are_tokens_shares_bytes_or_methods(text, budget):
    assert CommonBudget.parse(text) == budget


@pytest.mark.parametrize("text", ["lots", "-3", "25 percent", ""])
def test_other_budgets_are_refused_with_the_four_forms(text):
    with pytest.raises(UsageError, match=r"tokens.*share.*bytes.*method"):
        CommonBudget.parse(text)


def test_a_common_budget_binds_only_methods_that_evict_and_have_none_of_their_own(model):
    common = CommonBudget(tokens=100)
    assert named("h2o").fit(common, model, SETTING).budget == Uniform(tokens_kept=100)
    assert named("h2o:tokens=50").fit(common, model, SETTING).budget == Uniform(tokens_kept=50)
    assert named("snapkv:share=50%+int4").fit(common, model, SETTING).budget == Uniform(share=0.5)
    assert named("snapkv+int4").fit(common, model, SETTING).budget == Uniform(tokens_kept=100)
    assert named("int4").fit(common, model, SETTING) == methods.parse("int4")


@pytest.mark.parametrize("spec", ["pyramidkv:window=16", "adakv:window=16", "kvzip", "prefixkv"])
def test_a_common_budget_is_spread_as_the_method_spreads_its_own(model, spec):
    own = named(spec).method.budget
    for common in (CommonBudget(tokens=100), CommonBudget(like=methods.parse("int8"))):
        fitted = named(spec).fit(common, model, SETTING).budget
        assert type(fitted) is type(own) is not Uniform
        assert dataclasses.replace(fitted, tokens_kept=None, share=own.share) == own
    assert named("razor").fit(CommonBudget(tokens=400), model, SETTING).budget == Uniform(tokens_kept=400)


@pytest.mark.parametrize("like", ["int4", "int8", "kivi-2:residual=32"])
@pytest.mark.parametrize("spec", ["random", "streaming_llm", "h2o", "snapkv:window=16"])
def test_the_bytes_of_another_method_are_met_within_two_percent(model, like, spec):
    setting = Setting(context=256, room=16, batch=1)
    common, dims = CommonBudget.parse(like), setting.dims(model)
    wanted = sum(layer_bytes(methods.parse(like), layer) for layer in dims)
    fitted = named(spec).fit(common, model, setting)
    taken = sum(layer_bytes(fitted, layer) for layer in dims)
    assert 0.98 * wanted <= taken <= wanted
    assert named(spec).target_bytes(common, dims) == wanted
    assert named(like).target_bytes(common, dims) is None


def test_a_budget_too_small_for_what_is_always_kept_names_the_method(model):
    with pytest.raises(UsageError, match=r"'snapkv' at a context of 256 tokens.*64"):
        named("snapkv").fit(CommonBudget(tokens=20), model, SETTING)
