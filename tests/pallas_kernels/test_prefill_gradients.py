"""Gradients of `prefill_attention`: every form's own backward pass equals autodiff of the definition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import prefill_attention
from pallas_kernels.compat import interpreted
from pallas_kernels.prefill_attention import reference, xla
from pallas_kernels.prefill_attention.api import OP
from pallas_kernels.prefill_attention.specs import PrefillSpec
from pallas_kernels.testing import assert_close
from tests.pallas_kernels.interpret import jitted, small_tiles
from tests.thin import thinned

PLAIN = [
    PrefillSpec("wide", 2, 1, 2, 300, 256, lengths=(300, 100), softcap=5.0, temperature="head"),
    PrefillSpec("window", 1, 1, 1, 300, 96, window=50, temperature="token"),
    PrefillSpec("bfloat16", 2, 1, 2, 140, 128, dtype="bfloat16", lengths=(140, 0)),
]
SELECTIVE = [
    PrefillSpec("shared", 2, 2, 2, 70, 32, lengths=(70, 30), softcap=6.0, temperature="token", selection=1),
    PrefillSpec("by_head", 1, 2, 1, 100, 16, window=40, selection=2),
]


def gradients(op: Callable[..., Any], spec: PrefillSpec) -> Any:
    """Of a scalar that depends on every result, in q, k, v, temperature and selection."""
    args, kwargs = spec.arguments()
    more = {name: kwargs.pop(name) for name in ("temperature", "selection") if name in kwargs}
    weights = jax.random.normal(jax.random.key(9), args[0].shape)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, more: dict[str, Any]) -> jax.Array:
        out, lse, *hidden = op(q, k, v, **(kwargs | more))
        total = (out.astype(jnp.float32) * weights).sum() + jnp.where(jnp.isfinite(lse), lse, 0.0).sum()
        return total + sum(jnp.sin(x).sum() for x in hidden)

    grads = jitted(jax.grad(loss, argnums=(0, 1, 2, 3)), *args, more)
    # The gradient of a float32 temperature is made of products of the activations, and as exact as those.
    return jax.tree.map(lambda x: x.astype(spec.dtype), grads)


@pytest.mark.parametrize("spec", thinned([SELECTIVE[0], *PLAIN]), ids=lambda spec: spec.name)
def test_those_of_the_tpu_kernels_equal_autodiff_of_the_reference(
    spec: PrefillSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_tiles(monkeypatch)
    with interpreted():
        grads = gradients(lambda *a, **k: OP(*a, **k, implementation="pallas_tpu"), spec)
    assert_close(grads, gradients(reference.run, spec))


@pytest.mark.parametrize("spec", thinned([*PLAIN[:2], *SELECTIVE]), ids=lambda spec: spec.name)
def test_those_of_the_xla_form_equal_autodiff_of_the_reference(
    spec: PrefillSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(xla, "CACHE_BYTES", 1)  # blocks of 16 queries: several spans
    grads = gradients(lambda *a, **k: OP(*a, **k, implementation="xla"), spec)
    assert_close(grads, gradients(reference.run, spec))


def test_a_temperature_is_a_factor_of_the_query() -> None:
    spec = PrefillSpec("factor", 2, 1, 2, 50, 16, temperature="head")
    (q, k, v), kwargs = spec.arguments()
    factor = kwargs.pop("temperature")
    warm = jitted(prefill_attention, q, k, v, **kwargs, temperature=factor)
    assert_close(warm, jitted(prefill_attention, q * factor[..., None], k, v, **kwargs))
