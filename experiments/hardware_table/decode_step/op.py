"""The op: `cache.step` on one token. Which kernels it uses is the cache's choice, as on the chip itself."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from experiments.hardware_table.decode_step.specs import HARDWARE
from kvjax.cache.layer_cache import LayerCache
from kvjax.cache.step import Step
from pallas_kernels.dispatch import Implementation, Op
from pallas_kernels.rope import Rope

THETA = 500_000.0


def run(cache: LayerCache, queries: jax.Array, keys: jax.Array, values: jax.Array) -> tuple[jax.Array, LayerCache]:
    """Attends one token [B, 1, heads, H] to the cache, and caches it."""
    half = queries.shape[-1] // 2
    rope = Rope(THETA ** -(jnp.arange(half) / half), jnp.ones(()))
    step = Step(
        queries,
        keys,
        values,
        positions=cache.length[:, None],
        valid=jnp.ones(queries.shape[:2], bool),
        rope=rope,
        scale=queries.shape[-1] ** -0.5,
    )
    return cache.step(step)


OPS = (
    Op(
        name="decode_step",
        implementations=(Implementation("pallas_tpu", run), Implementation("pallas_gpu", run)),
        example=HARDWARE[0].abstract,
    ),
)
