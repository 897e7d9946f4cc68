"""Logits without values, and values of chosen slots: both equal what `decode_attention` and `decode` say."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import DenseLoader, decode_attention, decode_logits, mix_slots
from pallas_kernels.decode_attention.specs import SPECS, DecodeSpec, Format
from pallas_kernels.pages import valid_slots
from pallas_kernels.testing import assert_close
from tests.pallas_kernels.interpret import jitted

NAMES = ("window_per_head", "kivi2", pytest.param("rotated_int4", marks=pytest.mark.slow))
FORMATS = {
    "bfloat16": Format(16),
    "int3-folded": Format(3, fold=2),
    "outliers-scaled": Format(8, outliers=2, scaled=True),
    "latents-of-all-heads": Format(8, shared=True, rank=16),
    "dense": Format(),
    "int4": Format(4, group=16),
    "float8": Format(code="float8", bits=8),
    "codebook": Format(2, code="codebook"),
}
CASES = [pytest.param(name, marks=pytest.mark.slow if i > 3 else ()) for i, name in enumerate(FORMATS)]


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_the_softmax(name: str) -> None:
    spec = next(s for s in SPECS if s.name == name)
    (q, keys, values), kwargs = spec.arguments()
    valid = valid_slots(spec.batch, spec.slots, kwargs["lengths"], kwargs["valid"])
    wanted = ("positions", "query_positions", "window", "scale", "softcap", "bias")
    shared = {"valid": valid, **{name: kwargs[name] for name in wanted}}
    _, _, expected = jitted(decode_attention, q, keys, values, **shared, return_logits=True, implementation="reference")
    assert_close(jitted(decode_logits, q, keys, **shared), expected)


@pytest.mark.parametrize("name", CASES)
def test_chosen_values_are_those_of_the_store(name: str) -> None:
    """Any slots in any order, the same one twice, and NaN where the weight is 0."""
    spec, rng = DecodeSpec("chosen", 2, 3, 2, 512, 32), np.random.default_rng(0)
    loader = FORMATS[name].loader(jax.random.key(1), spec.batch, spec.kv_heads, spec.slots, spec.head_dim)
    slots = rng.integers(0, spec.slots, (2, 3, 2, 9)).astype(np.int32)
    weights = rng.random((2, 3, 2, 9)).astype(np.float32) * (np.arange(9) != 4)
    decoded = np.broadcast_to(loader.decode(), (2, 3, spec.slots, spec.head_dim)).astype(np.float64)
    expected = np.zeros((2, 3, 2, spec.head_dim))
    for b, k, r, c in np.ndindex(*slots.shape):
        expected[b, k, r] += weights[b, k, r, c] * decoded[b, k, slots[b, k, r, c]]
    got = jitted(mix_slots, loader, jnp.asarray(slots), jnp.asarray(weights))
    np.testing.assert_allclose(got, expected, atol=2e-5)


def test_what_has_no_weight_is_no_number() -> None:
    values = jnp.ones((1, 1, 8, 4)).at[:, :, 3].set(jnp.nan)
    out = mix_slots(DenseLoader(values), jnp.array([[[[2, 3]]]]), jnp.array([[[[0.5, 0.0]]]]))
    np.testing.assert_array_equal(out, np.full((1, 1, 1, 4), 0.5))


def test_a_block_is_not_read_in_part() -> None:
    loader = Format(4, block=32).loader(jax.random.key(0), 1, 1, 64, 32)
    with pytest.raises(ValueError, match="blocks of 32 slots"):
        mix_slots(loader, jnp.zeros((1, 1, 1, 2), jnp.int32), jnp.ones((1, 1, 1, 2)))
    with pytest.raises(ValueError, match="positions"):
        decode_logits(jnp.ones((1, 1, 1, 32)), loader, valid=jnp.ones((1, 1, 64), bool), window=4, scale=1.0)
