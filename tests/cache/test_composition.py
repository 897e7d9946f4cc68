"""Parts go together: most combinations build, the page that says so is true, and drawn ones obey the laws."""

from __future__ import annotations

import dataclasses
import functools
import math
import random

import jax
import numpy as np
import pytest

from experiments import composition
from kvjax.cache.head_split import empty_layer
from kvjax.cache.layer_cache import blank_data
from kvjax.cache.method import CacheMethod
from kvjax.cache.plan import layer_bytes
from kvjax.errors import UsageError
from tests.cache.cases import BUDGETS, CODECS, FATES, POLICIES, SELECTORS
from tests.cache.driver import Inputs, Run, Setup, dims_of, draw, run

LENGTHS = (64, 45, 17)
QUICK = 8
DRAWN = 32


@functools.cache
def inputs_of(junk: float = 3.0) -> Inputs:
    return dataclasses.replace(draw(21, LENGTHS, padded=64, decoded=12, query_heads=4), junk=junk)


def drawn(seed: int) -> CacheMethod:
    """A random combination, drawn anew until one is not refused."""
    choose = random.Random(seed)

    def one(parts: dict) -> object:
        return parts[choose.choice(sorted(parts))]

    while True:
        policy = one({name: policy for name, policy in POLICIES.items() if not policy.needs_hiding})
        budget = one({name: budget for name, budget in BUDGETS.items() if name != "full"})
        keys, values, fate, selector = (one(parts) for parts in (CODECS, CODECS, FATES, SELECTORS))
        block = math.lcm(*(codec.block for codec in (keys, values, *fate.codecs)))
        every = block if policy.online and not budget.pooled and choose.random() < 0.7 else None
        try:
            method = CacheMethod(
                budget=budget,
                policy=policy,
                fate=fate,
                selector=selector,
                keys=keys,
                values=values,
                sinks=choose.choice([0, 2]),
                recent=max(8, policy.least_recent),
                every=every,
                rotate=choose.choice(["write", "read"]),
            )
            empty_shape(method)
        except UsageError:
            continue
        return method


def empty_shape(method: CacheMethod) -> object:
    dims = dims_of(inputs_of())
    return jax.eval_shape(lambda: empty_layer(method, dims, data=blank_data(method, dims)))


@functools.cache
def result_of(seed: int) -> Run:
    return run(Setup(drawn(seed), dims_of(inputs_of())), inputs_of())


SEEDS = [pytest.param(seed, marks=() if seed < QUICK else pytest.mark.slow) for seed in range(DRAWN)]


@pytest.mark.parametrize("seed", SEEDS)
def test_drawn_combinations_obey_the_laws(seed: int) -> None:
    """Bytes are declared, poison changes nothing, rows are alone, positions are a set, outputs are finite."""
    method, clean, dims = drawn(seed), result_of(seed), dims_of(inputs_of())
    leaves = jax.tree.leaves(empty_shape(method))
    assert layer_bytes(method, dims) == sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    assert np.isfinite(clean.outputs).all()

    spoiled = run(Setup(method, dims), inputs_of(junk=math.nan), math.nan)
    np.testing.assert_array_equal(clean.outputs, spoiled.outputs)
    np.testing.assert_array_equal(clean.held, spoiled.held)

    order = [2, 0, 1]
    other = run(Setup(method, dims), inputs_of().take(order))
    np.testing.assert_allclose(other.outputs, np.asarray(clean.outputs)[:, order], atol=1e-6, rtol=1e-6)

    for b, length in enumerate(LENGTHS):
        for head in range(2):
            held = clean.kept(12, b, head)
            assert len(held) == len(set(held)) and set(held) <= set(range(length + 12))
            assert set(range(length + 12 - 8, length + 12)) <= set(held)


def test_most_combinations_build_and_the_page_says_which() -> None:
    parts = composition.samples()
    results = [reason for choice, reason in composition.tried(parts) if parts.budgets[choice.budget].evicts]
    assert sum(reason is None for reason in results) >= 0.6 * len(results)
    assert composition.PAGE.read_text(encoding="utf-8") == composition.page()


def test_every_part_has_a_sample_on_the_page() -> None:
    """No part is missing from the table because somebody forgot it."""
    parts = composition.samples()
    for ours, theirs in ((parts.policies, POLICIES), (parts.budgets, BUDGETS), (parts.fates, FATES)):
        assert {type(part) for part in theirs.values()} <= {type(part) for part in ours.values()}
    inside = {"Fixed", "LloydMax"}  # codecs that others are made of
    assert {type(c).__name__ for c in CODECS.values()} - inside <= {type(c).__name__ for c in parts.codecs.values()}
