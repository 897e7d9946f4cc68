"""Grouping of heads under any map, and prompt attention against the slow oracle."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.attention.rope import RopeConfig
from kvjax.cache.prompt import attend_prompt, group_filled, group_queries, ungroup
from kvjax.cache.step import Step
from tests.oracles.attention import attend_one
from tests.oracles.rotary import rotate_each

B, T, H = 2, 7, 8
MAPS = {
    "in order": (None, 4, 2),
    "in order, named": ((0, 0, 1, 1), 4, 2),
    "one per head": (None, 3, 3),
    "one for all": (None, 3, 1),
    "even, shuffled": ((1, 0, 0, 1), 4, 2),
    "uneven": ((2, 0, 2, 2, 1), 5, 3),
    "a head that nobody reads": ((2, 0, 2), 3, 3),
}


def make_step(name: str, **fields: object) -> Step:
    heads, n, k = MAPS[name]
    rng = np.random.default_rng(0)
    q, keys, values = (rng.standard_normal((B, T, count, H)).astype(np.float32) for count in (n, k, k))
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    step = {"valid": np.ones((B, T), bool), "scale": 0.3, "kv_head_of_query": heads} | fields
    arrays = (jnp.asarray(x) for x in (q, keys, values, positions))
    return Step(*arrays, **step)  # pyright: ignore[reportArgumentType, reportCallIssue]


def head_map(name: str) -> list[int]:
    heads, n, k = MAPS[name]
    return list(heads) if heads else [head // (n // k) for head in range(n)]


@pytest.mark.parametrize("name", MAPS)
def test_grouping_puts_each_query_head_under_its_kv_head(name: str) -> None:
    step = make_step(name)
    grouped, filled = group_queries(step), np.asarray(group_filled(step))
    members = [[head for head, kv in enumerate(head_map(name)) if kv == group] for group in range(MAPS[name][2])]
    assert grouped.shape == (B, *filled.shape[1:], T, H)
    assert filled[0].sum(axis=1).tolist() == [len(group) for group in members]
    for kv, group in enumerate(members):
        np.testing.assert_array_equal(grouped[:, kv, : len(group)], jnp.moveaxis(step.queries[:, :, group], 2, 1))
    poisoned = jnp.where(filled[..., None, None], grouped, jnp.nan)
    np.testing.assert_array_equal(ungroup(step, poisoned), step.queries)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("name", MAPS)
def test_prompt_attention_equals_the_oracle(name: str, window: int | None) -> None:
    step = make_step(name, window=window, softcap=0.9, rope=RopeConfig(50.0).table(H, jnp.int32(T)))
    out, lse = jax.jit(attend_prompt)(step)
    positions, kv_of = np.arange(T), head_map(name)
    for row in range(B):
        q, k = (rotate_each(np.asarray(x[row], np.float64), positions, 50.0) for x in (step.queries, step.keys))
        for head, kv in enumerate(kv_of):
            for position in range(T):
                first = 0 if window is None else max(0, position - window + 1)
                keys, values = k[first : position + 1, kv], np.asarray(step.values)[row, first : position + 1, kv]
                expected, _ = attend_one(q[position, head] * 0.3 * np.sqrt(H), keys, values, softcap=0.9)
                np.testing.assert_allclose(out[row, position, head], expected, atol=2e-6)
    empty = np.broadcast_to(~np.asarray(group_filled(step))[0, :, :, None], lse.shape[1:])
    assert (np.isposinf(lse) == empty).all()


def test_right_padding_changes_nothing() -> None:
    valid = np.ones((B, T), bool)
    valid[1, 4:] = False
    step = make_step("uneven", valid=jnp.asarray(valid))
    poison = jnp.where(valid[:, :, None, None], 0.0, jnp.nan)
    fields = {name: getattr(step, name) + poison for name in ("queries", "keys", "values")}
    padded = Step(**(vars(step) | fields))
    out, _ = attend_prompt(padded)
    expected, _ = attend_prompt(make_step("uneven"))
    np.testing.assert_allclose(out[0], expected[0], atol=1e-6)
    np.testing.assert_allclose(out[1, :4], expected[1, :4], atol=1e-6)
