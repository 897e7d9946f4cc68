"""Heads of one layer: order, means, principal directions, likeness; each against a form of its own."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.attention.rope import Llama3, RopeConfig
from kvjax.convert import heads
from kvjax.convert.moments import weight_moments
from kvjax.models.config import TransformerConfig
from tests.oracles import svd_heads as oracle

D, N, K, H, T = 12, 8, 4, 6, 9
READS = [n * K // N for n in range(N)]
RNG = np.random.default_rng(0)
Numpy = np.ndarray[Any, Any]


def attention(bias: bool = True) -> heads.Attention:
    shapes = {"q": (D, N, H), "k": (D, K, H), "v": (D, K, H), "o": (N, H, D)}
    made = {name: {"kernel": RNG.standard_normal(shape)} for name, shape in shapes.items()}
    if bias:
        made |= {name: made[name] | {"bias": RNG.standard_normal(shapes[name][1:])} for name in "qkv"}
    return made


def apply(parts: heads.Attention, x: Numpy, reads: list[int]) -> Numpy:
    """The layer's output [T, D] without rotary embedding."""
    q, k, v = (np.einsum("td,dnh->tnh", x, parts[n]["kernel"]) + parts[n].get("bias", 0) for n in "qkv")
    return np.einsum("tnh,nhd->td", oracle.plain(q, k, v, reads, 0.4), parts["o"]["kernel"])


def outer(x: Numpy) -> Numpy:
    return np.einsum("tkh,tjc->khjc", x, x)


def test_principal_directions_are_singular_vectors() -> None:
    rows = RNG.standard_normal((40, 10)) * np.linspace(1, 4, 10)
    ours, theirs = heads.principal(rows.T @ rows, 3), oracle.top(rows, 3)
    np.testing.assert_allclose(abs(ours @ theirs.T), np.eye(3), atol=1e-8)


def test_bases_of_groups_and_of_the_layer() -> None:
    x = RNG.standard_normal((50, K, H)) * RNG.uniform(0.2, 3, (K, H))
    bases, whole = heads.group_bases(outer(x), 2), heads.layer_basis(outer(x), 2)
    assert bases.shape == (2, H, 2 * H) and whole.shape == (K, H, 2 * H)
    for i, basis in enumerate(bases):
        theirs = oracle.top(x[:, 2 * i : 2 * i + 2].reshape(50, -1), H)
        np.testing.assert_allclose(basis.T @ basis, theirs.T @ theirs, atol=1e-8)
    flat, theirs = whole.reshape(K * H, -1), oracle.top(x.reshape(50, -1), 2 * H)
    np.testing.assert_allclose(flat @ flat.T, theirs.T @ theirs, atol=1e-8)


def test_means() -> None:
    parts = attention()
    made = heads.pooled(parts["k"], 2)
    for group, name in itertools.product(range(2), ("kernel", "bias")):
        old, new = parts["k"][name], made[name]
        np.testing.assert_allclose(new[..., group, :], (old[..., 2 * group, :] + old[..., 2 * group + 1, :]) / 2)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("fewer", [1, 2, 4])
def test_absorbed_directions_compute_what_the_paper_says(fewer: int, bias: bool) -> None:
    """Keys, values, queries and outputs that were projected one after the other, in the original heads."""
    parts, x = attention(bias), RNG.standard_normal((T, D))
    q, k, v = (np.einsum("td,dnh->tnh", x, parts[n]["kernel"]) + parts[n].get("bias", 0) for n in "qkv")
    omegas, psi = (heads.group_bases(outer(RNG.standard_normal((60, K, H))), fewer) for _ in range(2))
    made = heads.absorbed_keys(heads.absorbed_values(parts, omegas, READS), psi, READS)
    assert made["k"]["kernel"].shape == made["v"]["kernel"].shape == (D, fewer, H)
    assert made["q"]["kernel"].shape == (D, N, H) and made["o"]["kernel"].shape == (N, H, D)
    read = oracle.converted(q, k, v, READS, 0.4, omegas, psi, joint=False)
    expected = np.einsum("tnh,nhd->td", read, parts["o"]["kernel"])
    found = apply(made, x, [n * fewer // N for n in range(N)])
    np.testing.assert_allclose(found, expected, atol=1e-9 * abs(expected).max())
    if fewer == K:
        np.testing.assert_allclose(found, apply(parts, x, READS), atol=1e-9 * abs(expected).max())


def test_the_order_of_heads_changes_nothing() -> None:
    parts, x = attention(), RNG.standard_normal((T, D))
    order = (2, 0, 3, 1)
    made = heads.ordered(parts, order)
    np.testing.assert_allclose(apply(made, x, READS), apply(parts, x, READS), atol=1e-12)
    np.testing.assert_array_equal(made["v"]["kernel"][:, 0], parts["v"]["kernel"][:, 2])
    v = RNG.standard_normal((30, K, H))
    np.testing.assert_allclose(heads.reordered(outer(v), order), outer(v[:, order]))


def test_likeness() -> None:
    x = RNG.standard_normal((400, K, H))
    turn = np.linalg.qr(RNG.standard_normal((H, H)))[0]
    x[:, 2] = 3 * x[:, 0]
    x[:, 3] = x[:, 1] @ turn
    same, turned = heads.cosine(outer(x)), heads.alignment(outer(x))
    for likeness in (same, turned):
        np.testing.assert_allclose(np.diag(likeness), 1)
        np.testing.assert_allclose(likeness[0, 2], 1)
        assert likeness[0, 1] < 0.2
    assert turned[1, 3] > 0.99 and abs(same[1, 3]) < 0.9
    assert heads.group_alike(turned, 2) == (0, 2, 1, 3)
    assert heads.group_alike(same, 1) == (0, 1, 2, 3) and heads.group_alike(same, 4) == (0, 1, 2, 3)


def test_a_head_of_zeros_is_like_no_other() -> None:
    x = RNG.standard_normal((20, K, H))
    x[:, 1] = 0
    for likeness in (heads.cosine(outer(x)), heads.alignment(outer(x))):
        assert np.isfinite(likeness).all() and likeness[0, 1] == 0
        assert sorted(heads.group_alike(likeness, 2)) == [0, 1, 2, 3]


@pytest.mark.parametrize("rope", [None, RopeConfig(50.0), RopeConfig(1e4, Llama3(8.0, 1.0, 4.0, 16))])
@pytest.mark.parametrize("norm", [False, True])
def test_moments_of_weights_are_those_of_every_position(rope: RopeConfig | None, norm: bool) -> None:
    sizes = TransformerConfig(8, D, 1, N, K, H, 4, 24)
    config = dataclasses.replace(sizes, rope=rope, qk_norm=norm, norm_offset=1.0, qkv_bias=True)
    parts = attention() | {"k_norm": {"scale": RNG.standard_normal(H)}}
    found = weight_moments(parts, config, 0)
    keys, values = (np.concatenate([parts[n]["kernel"], parts[n]["bias"][None]]) for n in "kv")
    if norm:
        keys = keys * (1 + parts["k_norm"]["scale"])
    np.testing.assert_allclose(found.values, outer(values))
    if rope is None:
        np.testing.assert_allclose(found.keys, outer(keys))
        return
    table = rope.table(H, jnp.int32(24))
    turned = np.zeros((K, H, K, H))
    for p in range(24):
        turned += outer(np.asarray(table.rotate(jnp.asarray(keys, jnp.float32), jnp.full((D + 1, 1), p)))) / 24
    np.testing.assert_allclose(found.keys, turned, atol=1e-5 * abs(turned).max())
