"""Joining the heads of a layer, all of them here or spread over devices."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from kvjax.cache.exchange import heads_over, mean_over_heads, sum_over_heads

X = np.arange(24, dtype=np.float32).reshape(2, 4, 3)


def test_without_shards_there_is_nothing_to_exchange() -> None:
    with heads_over(None):
        np.testing.assert_array_equal(mean_over_heads(X), X.mean(1, keepdims=True))
        np.testing.assert_array_equal(sum_over_heads(X), X.sum(1, keepdims=True))


@pytest.mark.skipif(jax.device_count() < 4, reason="needs 4 devices")
def test_shards_get_the_sum_and_the_mean_of_all_heads() -> None:
    mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])

    def both(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        with heads_over("model"):
            return sum_over_heads(x), mean_over_heads(x)

    total, mean = jax.jit(jax.shard_map(both, mesh=mesh, in_specs=P(None, "model"), out_specs=P()))(X)
    np.testing.assert_array_equal(total, X.sum(1, keepdims=True))
    np.testing.assert_array_equal(mean, X.mean(1, keepdims=True))
    np.testing.assert_array_equal(mean_over_heads(X), X.mean(1, keepdims=True))
