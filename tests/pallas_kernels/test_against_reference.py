"""Law 9: every implementation equals its op's reference, over all specs, and the laws that hold for any of them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels import DenseLoader, attention_mass, decode_attention, merge, prefill_attention, supported
from pallas_kernels.attention_mass import specs as mass_specs
from pallas_kernels.decode_attention import specs as decode_specs
from pallas_kernels.ops import OPS
from pallas_kernels.prefill_attention import specs as prefill_specs
from pallas_kernels.testing import assert_close
from tests.thin import thinned

SPECS = {
    "prefill_attention": prefill_specs.SPECS,
    "decode_attention": decode_specs.SPECS,
    "attention_mass": mass_specs.SPECS,
}
CASES = [
    pytest.param(op, implementation, spec, id=f"{op.name}-{implementation.name}-{spec.name}")
    for op in OPS
    if op.name in SPECS  # cache_update moves bits, for which there is no tolerance: test_cache_update
    for implementation in op.implementations
    if implementation.name != "reference" and implementation.declines("cpu") is None
    for spec in SPECS[op.name]
]


def jitted(op: Any, spec: Any, implementation: str, **more: Any) -> tuple[Any, tuple, dict]:
    args, kwargs = spec.arguments()
    kwargs |= more
    static = {k: v for k, v in kwargs.items() if not isinstance(v, jax.Array)}
    arrays = {k: v for k, v in kwargs.items() if isinstance(v, jax.Array)}
    return jax.jit(lambda *a, **k: op(*a, **k, **static, implementation=implementation)), args, arrays


@pytest.mark.parametrize(("op", "implementation", "spec"), thinned(CASES, 4))
def test_equals_the_reference(op: Any, implementation: Any, spec: Any) -> None:
    run, args, arrays = jitted(op, spec, implementation.name)
    reference, _, _ = jitted(op, spec, "reference")
    assert_close(run(*args, **arrays), reference(*args, **arrays))


@pytest.mark.parametrize("spec", thinned([s for s in decode_specs.SPECS if s.slots <= 700], 6), ids=lambda s: s.name)
def test_logits_on_request_are_those_of_the_softmax(spec: decode_specs.DecodeSpec) -> None:
    run, args, arrays = jitted(decode_attention, spec, "xla", return_logits=True)
    reference, _, _ = jitted(decode_attention, spec, "reference", return_logits=True)
    out, lse, logits = run(*args, **arrays)
    assert_close((out, lse, logits), reference(*args, **arrays))
    np.testing.assert_allclose(jax.nn.logsumexp(logits, axis=-1), lse, rtol=1e-5, atol=1e-5)


def poison(x: jax.Array, where: jax.Array, bad: float) -> jax.Array:
    return jnp.where(where.reshape(where.shape + (1,) * (x.ndim - where.ndim)), jnp.asarray(bad, x.dtype), x)


@pytest.mark.parametrize("bad", [float("nan"), 1e30])
@pytest.mark.parametrize("name", ["dense", "ragged_bf16", "int8", "kivi4", "rotated_int4", "softcap"])
def test_poisoned_empty_slots_change_nothing(name: str, bad: float) -> None:
    """Whatever lies in a slot that is not valid; only the order of a sum may differ, where a NaN takes another path."""
    spec = next(s for s in decode_specs.SPECS if s.name == name)
    spec = dataclasses.replace(spec, lengths=tuple(spec.slots // 2 for _ in range(spec.batch)))
    run, (q, keys, values), arrays = jitted(decode_attention, spec, "xla")

    def poisoned(loader: Any) -> Any:
        def leaf(x: jax.Array) -> jax.Array:
            if not jnp.issubdtype(x.dtype, jnp.floating):
                return x
            empty = jnp.arange(x.shape[2]) >= -(-x.shape[2] // 2)
            return poison(x, jnp.broadcast_to(empty, x.shape[:3]), bad)

        return loader.with_slots(jax.tree.map(leaf, loader.slots))

    clean = run(q, keys, values, **arrays)
    dirty = run(q, poisoned(keys), poisoned(values), **arrays)
    assert_close(dirty, clean)


@pytest.mark.parametrize("name", ["train_64", "ragged", "window", "softcap", "empty_row"])
def test_gradients_equal_autodiff_of_the_reference(name: str) -> None:
    spec = next(s for s in prefill_specs.SPECS if s.name == name)
    args, kwargs = spec.arguments()
    weights = jax.random.normal(jax.random.key(9), args[0].shape)

    def loss(implementation: str) -> Any:
        def value(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            out, lse = prefill_attention(q, k, v, **kwargs, implementation=implementation)
            return (out * weights).sum() + jnp.where(jnp.isfinite(lse), lse, 0.0).sum()

        return jax.jit(jax.grad(value, argnums=(0, 1, 2)))(*args)

    assert_close(loss("xla"), loss("reference"))


@given(seed=st.integers(0, 2**16), cut=st.integers(1, 39), empty=st.booleans())
def test_merged_parts_equal_attention_over_the_whole(seed: int, cut: int, empty: bool) -> None:
    """Any split of the slots, an empty part included, merges to the same output and log-sum-exp, in any order."""
    k_key, v_key, q_key = jax.random.split(jax.random.key(seed), 3)
    k, v = (jax.random.normal(key, (2, 2, 40, 8)) for key in (k_key, v_key))
    q = 3 * jax.random.normal(q_key, (2, 2, 3, 8))
    first = jnp.arange(40) < (0 if empty else cut)

    def part(valid: jax.Array) -> tuple[jax.Array, jax.Array]:
        mask = jnp.broadcast_to(valid, (2, 1, 40))
        return decode_attention(q, DenseLoader(k), DenseLoader(v), valid=mask, scale=0.5)[:2]

    whole, a, b = part(jnp.ones(40, bool)), part(first), part(~first)
    for merged in (merge([a, b]), merge([b, a]), merge([merge([a]), b])):
        assert_close(merged, whole)


def test_nothing_merged_with_nothing_is_nothing() -> None:
    part = (jnp.zeros((1, 1, 2, 4)), jnp.full((1, 1, 2), -jnp.inf))
    out, lse = merge([part, part])
    assert (out == 0).all() and jnp.isneginf(lse).all()


def test_a_row_of_probabilities_sums_to_one() -> None:
    spec = prefill_specs.PrefillSpec("mass", 2, 2, 4, 96, 32, lengths=(96, 50), window=40)
    (q, k, v), kwargs = spec.arguments()
    _, lse = prefill_attention(q, k, v, **kwargs)
    at = jnp.broadcast_to(jnp.arange(96), (2, 96))
    valid = kwargs["valid"]
    shared = {"query_positions": at, "key_positions": at, "query_valid": valid, "key_valid": valid}
    mass = attention_mass(q, k, lse, **shared, window=40, scale=spec.head_dim**-0.5)
    np.testing.assert_allclose(mass.sum(-1), 4.0 * np.array([[96.0], [50.0]]) * np.ones((2, 2)), rtol=1e-5)


def temporaries(function: Any, *args: Any, **kwargs: Any) -> int:
    return jax.jit(function).lower(*args, **kwargs).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("bits", [16, 8, 4, 2])
def test_quantised_decode_never_decodes_a_whole_cache(bits: int) -> None:
    """At 4,096 slots the temporaries stay below an eighth of the decoded keys and values in float32."""
    stored = decode_specs.Format(bits)
    spec = decode_specs.DecodeSpec("memory", 2, 8, 4, 4096, 128, stored, stored)
    run, args, arrays = jitted(decode_attention, spec, "xla")
    decoded = 2 * 4 * 2 * 8 * 4096 * 128
    assert temporaries(run, *args, **arrays) < decoded / 8


def test_attention_mass_never_holds_all_probabilities() -> None:
    """Twice the queries and keys take at most a little more than twice the memory, not four times."""

    def size(tokens: int) -> int:
        spec = mass_specs.MassSpec("memory", 1, 2, 4, tokens, tokens, 32)
        run, args, arrays = jitted(attention_mass, spec, "xla")
        return temporaries(run, *args, **arrays)

    assert size(4096) < 2.5 * size(2048)
    assert size(4096) < 4 * 8 * 4096 * 4096 / 8


def test_what_is_supported_here() -> None:
    rows = {(row.op, row.implementation): row for row in supported()}
    assert all(rows[op.name, "xla"].runs and rows[op.name, "reference"].runs for op in OPS)


def test_an_unknown_implementation_is_refused_by_name() -> None:
    args, kwargs = prefill_specs.SPECS[0].arguments()
    with pytest.raises(ValueError, match="no implementation 'cuda'"):
        prefill_attention(*args, **kwargs, implementation="cuda")
