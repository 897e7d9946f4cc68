"""Attention of all tokens to all valid ones, against the slow oracle and a formula that jax differentiates."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.attention.bidirectional import Bidirectional
from kvjax.cache.step import Step
from kvjax.errors import UsageError
from tests.oracles.attention import attend_one

B, T, N, K, H = 2, 6, 4, 2, 8
READS = {
    "groups": {},
    "uneven": {"kv_head_of_query": (0, 1, 1, 1)},
    "data": {"head_map": jnp.int32([[0] * 4, [0, 0, 0, 1]])},
}


def step_of(**fields: Any) -> Step:
    rng = np.random.default_rng(0)
    q, keys, values = (rng.standard_normal((B, T, n, H)).astype(np.float32) for n in (N, K, K))
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    valid = np.arange(T) < np.array([[T], [4]])
    return Step(*(jnp.asarray(x) for x in (q, keys, values, positions, valid)), scale=H**-0.5, **fields)


def reads_of(name: str, row: int) -> Any:
    fields = READS[name]
    return (
        fields.get("kv_head_of_query", (0, 0, 1, 1)) if "head_map" not in fields else fields["head_map"][row].tolist()
    )


@pytest.mark.parametrize("name", READS)
def test_each_token_sees_all_that_are_valid(name: str) -> None:
    step = step_of(**READS[name])
    poisoned = {x: jnp.where(step.valid[..., None, None], getattr(step, x), jnp.nan) for x in ("keys", "values")}
    out, _ = jax.jit(Bidirectional().step)(dataclasses.replace(step, **poisoned))
    queries, keys, values = (np.asarray(x, np.float64) for x in (step.queries, step.keys, step.values))
    for row, length in enumerate((T, 4)):
        for n, kv in enumerate(reads_of(name, row)):
            for t in range(length):
                expected, _ = attend_one(queries[row, t, n], keys[row, :length, kv], values[row, :length, kv])
                np.testing.assert_allclose(out[row, t, n], expected, atol=1e-5)


@pytest.mark.parametrize("name", READS)
def test_gradients_are_those_of_the_definition(name: str) -> None:
    step = step_of(**READS[name])
    reads = jnp.int32([reads_of(name, row) for row in range(B)])

    def plain(q: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
        keys, values = (jnp.take_along_axis(x, reads[:, None, :, None], axis=2) for x in (keys, values))
        logits = jnp.einsum("btnh,bsnh->bnts", q, keys) * step.scale
        weights = jax.nn.softmax(jnp.where(step.valid[:, None, None], logits, -jnp.inf))
        return jnp.einsum("bnts,bsnh->btnh", weights, values)

    def ours(q: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
        return Bidirectional().step(dataclasses.replace(step, queries=q, keys=keys, values=values))[0]

    def slopes(attend: Any) -> Any:
        loss = jax.grad(lambda *x: jnp.sum(jnp.sin(attend(*x)) * step.valid[..., None, None]), argnums=(0, 1, 2))
        return jax.jit(loss)(step.queries, step.keys, step.values)

    for one, other in zip(slopes(ours), slopes(plain), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("fields", [{"window": 3}, {"selective": True}])
def test_what_needs_an_order_is_refused(fields: Any) -> None:
    with pytest.raises(UsageError, match="need an order"):
        Bidirectional().step(step_of(**fields))
