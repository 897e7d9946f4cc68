"""Selective attention (Leviathan et al., 2024, arXiv:2410.02703): the equations in NumPy, step by step, in size."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import DenseLoader, decode_attention, prefill_attention
from pallas_kernels.compat import interpreted
from pallas_kernels.prefill_attention import blocks, xla
from pallas_kernels.prefill_attention.specs import PrefillSpec
from tests.pallas_kernels.interpret import QUICK, jitted, small_tiles

SPECS = [
    PrefillSpec("shared", 2, 2, 2, 70, 16, lengths=(70, 30), softcap=6.0, temperature="token", selection=1),
    PrefillSpec("by_head", 1, 2, 3, 100, 16, window=40, selection=2),
]
Arrays = dict[str, Any]


def arrays_of(spec: PrefillSpec) -> Arrays:
    """All arrays of a workload by name, in float64; an absent temperature is 1."""
    (q, k, v), named = spec.arrays()
    heat = named.get("temperature", jnp.ones((spec.batch, spec.tokens)))
    chooser, chosen = named["selection"]
    arrays = {"q": q, "k": k, "v": v, "heat": heat, "chooser": chooser, "chosen": chosen}
    return {name: np.asarray(x, np.float64) for name, x in arrays.items()}


def transcribed(spec: PrefillSpec, x: Arrays) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """S = ReLU(logits), strictly below the diagonal; F = its running sum, one query later; softmax(logits - F)."""
    out, hidden = np.zeros_like(x["q"]), np.zeros(x["chosen"].shape[:3])
    lse, scale = np.full(x["q"].shape[:4], -np.inf), spec.head_dim**-0.5
    for b, head in np.ndindex(spec.batch, spec.kv_heads):
        n, j = (spec.lengths or (spec.tokens,) * spec.batch)[b], head % spec.selection
        distance = np.arange(n)[:, None] - np.arange(n)
        seen = (distance >= 0) & (distance < (spec.window or n))
        chosen = np.maximum(scale * x["chooser"][b, j, :n] @ x["chosen"][b, j, :n].T, 0) * (seen & (distance > 0))
        earlier = np.cumsum(np.concatenate([np.zeros((1, n)), chosen[:-1]]), axis=0)
        hidden[b, j, :n] = chosen.sum(0)
        for g in range(spec.groups):
            logits = scale * x["q"][b, head, g, :n] @ x["k"][b, head, :n].T
            logits = logits if spec.softcap is None else spec.softcap * np.tanh(logits / spec.softcap)
            weights = np.where(seen, np.exp(logits * x["heat"][b, :n, None] - earlier), 0)
            lse[b, head, g, :n] = np.log(weights.sum(1))
            out[b, head, g, :n] = weights @ x["v"][b, head, :n] / weights.sum(1, keepdims=True)
    return out, lse, hidden


def prefill(spec: PrefillSpec, x: Any, implementation: str) -> Any:
    valid = spec.arrays()[1]["valid"]
    named = {"temperature": x["heat"], "selection": (x["chooser"], x["chosen"]), **spec.static}
    return prefill_attention(x["q"], x["k"], x["v"], valid=valid, **named, implementation=implementation)


def float32(x: Arrays) -> dict[str, jax.Array]:
    return {name: jnp.asarray(array, jnp.float32) for name, array in x.items()}


@pytest.fixture
def several_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xla, "CACHE_BYTES", 1)  # blocks of 16 queries
    small_tiles(monkeypatch)


@pytest.mark.usefixtures("several_spans")
@pytest.mark.parametrize("implementation", ["reference", "xla", "pallas_tpu"])
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_results_are_those_of_the_equations(spec: PrefillSpec, implementation: str) -> None:
    x = arrays_of(spec)
    with interpreted():
        got = jitted(lambda x: prefill(spec, x, implementation), float32(x))
    for name, a, b in zip(("out", "lse", "hidden"), got, transcribed(spec, x), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.usefixtures("several_spans")
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_gradients_are_slopes_of_the_equations(spec: PrefillSpec) -> None:
    """Along a random direction of each argument, against a central difference in float64."""
    x, rng = arrays_of(spec), np.random.default_rng(0)
    weights = [rng.standard_normal(result.shape) for result in transcribed(spec, x)]

    def total(results: Any, np: Any) -> Any:
        return sum((w * np.where(np.isfinite(r), r, 0.0)).sum() for w, r in zip(weights, results, strict=True))

    grads = jitted(jax.grad(lambda x: total(prefill(spec, x, "xla"), jnp)), float32(x))
    for name, array in x.items():
        direction = rng.standard_normal(array.shape) * (array != 0)  # the protected token's are on the kink of ReLU
        ends = (transcribed(spec, x | {name: array + sign * 1e-6 * direction}) for sign in (1, -1))
        up, down = (total(results, np) for results in ends)
        slope = (np.asarray(grads[name], np.float64) * direction).sum()
        size = np.linalg.norm(grads[name])  # of the slope along a random direction
        assert abs(slope - (up - down) / 2e-6) < 1e-4 * size, name


def test_head_0_decides_and_the_first_token_is_protected() -> None:
    """As in the paper: one layer of 3 heads, in which the logits of head 0 select for all."""
    tokens, heads, dim = 24, 3, 8
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, heads, tokens, dim))
    logits = np.einsum("htd,hsd->hts", q, k) / np.sqrt(dim)
    select = np.tril(np.maximum(logits[0], 0), -1)
    select[:, 0] = 0
    shifted = np.concatenate([np.zeros((1, tokens)), np.cumsum(select, axis=0)])
    weights = np.tril(np.exp(logits - shifted[:-1]))
    expected = np.einsum("hts,hsd->htd", weights / weights.sum(-1, keepdims=True), v)

    q, k, v = (jnp.asarray(x, jnp.float32)[None] for x in (q, k, v))
    selection = (q[:, :1], k[:, :1].at[:, :, 0].set(0))
    valid = jnp.ones((1, tokens), bool)
    out, _, hidden = jitted(prefill_attention, q[:, :, None], k, v, valid=valid, scale=dim**-0.5, selection=selection)
    np.testing.assert_allclose(out[0, :, 0], expected, atol=5e-6)
    np.testing.assert_allclose(hidden[0, 0], shifted[-1], rtol=1e-5, atol=1e-6)


def test_a_cache_that_carries_what_is_hidden_decodes_as_prefill_computes() -> None:
    """Token by token: attend with the row of sums as a bias, then add what this token hides; prefix after prefix."""
    window = 20
    spec = PrefillSpec("steps", 1, 2, 2, 48, 16, window=window, selection=2)
    (q, k, v), named = spec.arguments()
    chooser, chosen = named["selection"]
    out, lse, hidden = jitted(prefill_attention, q, k, v, **named)
    at = jnp.arange(spec.tokens, dtype=jnp.int32)

    def step(sums: jax.Array, t: jax.Array) -> Any:
        result = decode_attention(
            q[:, :, :, t],
            DenseLoader(k),
            DenseLoader(v),
            lengths=t[None] + 1,
            bias=-sums,
            positions=at[None, None],
            query_positions=jnp.full((1, spec.groups), t),
            window=window,
            scale=spec.static["scale"],
        )
        more = jnp.maximum(jnp.einsum("bjc,bjsc->bjs", chooser[:, :, t], chosen) * spec.static["scale"], 0)
        return sums + jnp.where((at < t) & (t - at < window), more, 0), result

    sums, (outs, lses) = jitted(lambda: jax.lax.scan(step, jnp.zeros_like(hidden), at))
    np.testing.assert_allclose(jnp.moveaxis(outs, 0, 3), out, atol=5e-6)
    np.testing.assert_allclose(jnp.moveaxis(lses, 0, 3), lse, atol=5e-6)
    np.testing.assert_allclose(sums, hidden, rtol=1e-5, atol=1e-6)


def temporaries(tokens: int) -> int:
    """Bytes of the forward and backward pass of the XLA form, beside arguments and results."""
    args, kwargs = PrefillSpec("memory", 1, 1, 1, tokens, 8, selection=1).abstract()
    valid, selection = kwargs.pop("valid"), kwargs.pop("selection")

    def loss(args: Any, selection: Any, valid: jax.Array) -> jax.Array:
        results = prefill_attention(*args, selection=selection, valid=valid, **kwargs, implementation="xla")
        return sum((x.sum() for x in results), start=jnp.zeros(()))

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)), compiler_options=QUICK)
    memory: Any = gradient.lower(args, selection, valid).compile().memory_analysis()
    return memory.temp_size_in_bytes


def test_nothing_grows_with_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of n blocks of queries, about 2 sqrt(n) rows are kept: m times the tokens take at most m sqrt(m) times the bytes.

    The larger number of blocks is a prime, so that no smaller number divides it.
    """
    monkeypatch.setattr(xla, "CACHE_BYTES", 1)  # blocks of 16 queries
    monkeypatch.setattr(blocks, "MAX_SPANS", 1)
    assert temporaries(16 * 509) < 8**1.5 * temporaries(16 * 64)
