"""Budgets: tokens, shares and bytes of what is kept."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvjax.cache.budget import Full, Uniform
from kvjax.cache.layout import CacheDims, ring_slots
from kvjax.cache.methods import parse
from kvjax.cache.plan import layer_bytes, resolve
from kvjax.errors import UsageError

DIMS = CacheDims(batch=4, kv_heads=2, query_heads=8, head_dim=64, max_length=1280, prompt_length=1024)
LAYERS = [dataclasses.replace(DIMS, layer=layer) for layer in range(3)]


@pytest.mark.parametrize("fields", [{}, {"tokens_kept": 5, "share": 0.5}, {"share": 0.5, "bytes_kept": 100}])
def test_exactly_one_measure(fields: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="exactly one of tokens, share or bytes"):
        Uniform(**fields)


@pytest.mark.parametrize(
    "fields", [{"tokens_kept": 0}, {"share": 0.0}, {"share": 1.5}, {"share": -0.1}, {"bytes_kept": 0}]
)
def test_a_budget_keeps_something(fields: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        resolve(dataclasses.replace(parse("random"), budget=Uniform(**fields)), LAYERS)


@given(st.integers(1, 100_000), st.sampled_from([0.05, 0.1, 0.125, 0.2, 0.25, 0.3, 0.5, 0.7, 0.9, 1.0]))
def test_a_share_is_the_same_on_host_and_device(length: int, share: float) -> None:
    """A row's budget in the compiled step is the number that the plan and the tables show."""
    budget = Uniform(share=share)
    assert int(budget.row_tokens(jnp.array([length]))[0]) == budget.tokens(length)
    assert length * share - 1 < budget.tokens(length) <= length * share + 1e-3


def test_full_and_tokens_per_row() -> None:
    lengths = jnp.array([3, 500])
    assert Full().row_tokens(lengths).tolist() == [3, 500]
    assert Uniform(tokens_kept=64).row_tokens(lengths).tolist() == [64, 64]


@pytest.mark.parametrize("spec", ["snapkv", "h2o", "streaming_llm", "random", "snapkv+int4", "h2o+kivi-2"])
@pytest.mark.parametrize("size", [550_000, 700_001, 1_100_000])
def test_bytes_resolve_to_the_most_tokens_that_fit(spec: str, size: int) -> None:
    method = resolve(parse(_with_bytes(spec, size)), LAYERS)
    one_row = [dataclasses.replace(dims, batch=1) for dims in LAYERS]

    def cost(tokens: int) -> int:
        budget = Uniform(tokens_kept=tokens)
        return sum(layer_bytes(dataclasses.replace(method, budget=budget), dims) for dims in one_row)

    tokens = method.budget.tokens(1024)
    assert cost(tokens) <= size
    more = tokens + 1
    while more < 1280 and cost(more) == cost(tokens):  # whole blocks
        more += 1
    assert cost(more) > size or more >= 1280


def _with_bytes(spec: str, size: int) -> str:
    first, plus, rest = spec.partition("+")
    return f"{first}:bytes={size}{plus}{rest}"


@pytest.mark.parametrize("rows", [1, 4])
def test_bytes_are_of_one_row(rows: int) -> None:
    """The batch does not change how much of a row's context is kept."""
    layers = [dataclasses.replace(dims, batch=rows) for dims in LAYERS]
    expected = resolve(parse("snapkv:bytes=700000"), LAYERS)
    assert resolve(parse("snapkv:bytes=700000"), layers) == expected


def test_bytes_that_hold_nothing_are_refused() -> None:
    with pytest.raises(UsageError, match="1000 bytes per row hold neither"):
        resolve(parse("snapkv:bytes=1000"), LAYERS)


def test_bytes_beyond_everything_keep_everything() -> None:
    method = resolve(parse("h2o:bytes=10GiB"), LAYERS)
    assert method.budget.tokens(1024) >= 1024


def test_an_unresolved_budget_in_bytes_says_what_to_call() -> None:
    with pytest.raises(UsageError, match=r"plan\.resolve"):
        Uniform(bytes_kept=1000).tokens(10)


def test_a_budget_below_sinks_and_window_is_refused_with_the_number_that_works() -> None:
    with pytest.raises(UsageError, match="65 tokens or more"):
        parse("snapkv:tokens=40").layout(DIMS)
    assert parse("snapkv:tokens=65").layout(DIMS).ring == 64


@given(st.integers(0, 300), st.sampled_from([1, 8, 16, 32]))
def test_a_ring_holds_its_window_after_giving_up_a_block(recent: int, block: int) -> None:
    """After the oldest block left and the new token came, at least `recent` are there; no smaller ring does that."""
    ring = ring_slots(recent, block)
    assert ring % block == 0
    if ring:
        assert ring - block + 1 >= recent
    smaller = ring - block
    assert smaller <= 0 or smaller - block + 1 < recent


@pytest.mark.parametrize("name", ["h2o:tokens=1000", "streaming_llm:tokens=900", "snapkv:tokens=500+int4"])
def test_a_budget_beyond_the_context_allocates_no_more_than_the_context(name: str) -> None:
    dims = CacheDims(batch=2, kv_heads=2, query_heads=4, head_dim=32, max_length=128, prompt_length=96)
    layout = parse(name).layout(dims)
    assert 128 <= layout.sinks + layout.ring + layout.body <= 128 + layout.block
