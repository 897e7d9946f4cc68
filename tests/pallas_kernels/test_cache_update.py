"""A block is written where it belongs and nowhere else, by every implementation, and in place."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import cache_update
from pallas_kernels.cache_update.specs import SPECS, UpdateSpec
from pallas_kernels.compat import interpreted
from pallas_kernels.rows import Rows, unfold
from tests.thin import thinned

SPEC = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)


def update(implementation: str, spec: UpdateSpec):
    (store, fresh, block), _ = spec.arguments()
    return jax.jit(functools.partial(cache_update, implementation=implementation))(store, fresh, block)


def bits(tree):
    """NaN compares equal to itself as bits."""
    return jax.tree.map(lambda x: np.asarray(x).view(np.uint8), unfold(tree))


@pytest.mark.parametrize("spec", thinned(SPECS, 4), ids=lambda spec: spec.name)
def test_the_definition_is_a_loop_over_blocks(spec: UpdateSpec) -> None:
    (store, fresh, block), _ = spec.arguments()
    got = unfold(update("reference", spec))
    plain, fresh = (unfold(tree) for tree in (store, fresh))
    block = np.broadcast_to(block, (spec.batch, spec.kv_heads))
    for name, leaf in plain.items():
        new, out = fresh[name], got[name]
        old, new, out = (np.asarray(x.data if isinstance(x, Rows) else x) for x in (leaf, new, out))
        want, size = old.copy(), new.shape[2]
        for b, k in np.ndindex(*block.shape):
            want[b, k, block[b, k] * size : (block[b, k] + 1) * size] = new[b, k, : old.shape[2] - block[b, k] * size]
        np.testing.assert_array_equal(out.view(np.uint8), want.view(np.uint8), err_msg=name)


@SPEC
def test_xla_equals_the_reference(spec: UpdateSpec) -> None:
    jax.tree.map(np.testing.assert_array_equal, bits(update("xla", spec)), bits(update("reference", spec)))


@SPEC
def test_the_tpu_kernel_equals_the_reference(spec: UpdateSpec) -> None:
    if spec.name == "plain_token":
        with pytest.raises(NotImplementedError, match="no leaf has whole tiles"):
            update("pallas_tpu", spec)
        return
    with interpreted():
        got = bits(update("pallas_tpu", spec))
    jax.tree.map(np.testing.assert_array_equal, got, bits(update("reference", spec)))


def test_a_donated_store_is_written_in_place() -> None:
    (store, fresh, block), _ = UpdateSpec("large", 2, 4, 4096, 128).abstract()
    compiled = jax.jit(cache_update, donate_argnums=0).lower(store, fresh, block).compile()
    memory = compiled.memory_analysis()
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(store))
    # 16-bit leaves are copied on a CPU, because their bits are what is written.
    narrow = sum(x.size * 2 for x in jax.tree.leaves(store) if x.dtype == jnp.bfloat16)
    assert memory.alias_size_in_bytes == size and memory.temp_size_in_bytes < 1.1 * narrow


def test_encoding_is_part_of_the_update() -> None:
    store = {"half": jnp.zeros((1, 1, 4, 2), jnp.bfloat16)}
    out = cache_update(store, jnp.ones((1, 1, 1, 2)), jnp.array([[2]]), encode=lambda x: {"half": 3 * x})
    assert out["half"].dtype == jnp.bfloat16 and out["half"][0, 0, :, 0].tolist() == [0, 0, 3, 0]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="3 fresh entries do not divide the 4 entries"):
        cache_update(jnp.zeros((1, 1, 4)), jnp.zeros((1, 1, 3)), jnp.array([[0]]))
