"""Gumbel noise of `attention_mass`: its definition in NumPy, its distribution, and Keyformer's scores made with it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import attention_mass
from pallas_kernels.attention_mass import GumbelNoise
from tests.pallas_kernels.interpret import QUICK, jitted

GROUPS = 2


def noise_of(seed: int, heads: Any) -> GumbelNoise:
    return GumbelNoise(jax.random.key_data(jax.random.key(seed)), jnp.asarray(heads))


def draws(noise: GumbelNoise, queries: Any, keys: Any) -> jax.Array:
    return jitted(noise.at, jnp.asarray(queries), jnp.asarray(keys), GROUPS)


def transcribed(noise: GumbelNoise, queries: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(uniform, Gumbel) [K * G, T, S] in float64, from the words that threefry gives every (query head, query)."""
    heads = (np.asarray(noise.head_index)[:, None] * GROUPS + np.arange(GROUPS)).ravel()
    key = jax.random.wrap_key_data(noise.key, impl="threefry2x32")
    fold = jax.jit(lambda head, query: jax.random.key_data(jax.random.fold_in(jax.random.fold_in(key, head), query)))
    words = np.stack([[fold(head, query) for query in queries] for head in heads])
    first, second = words[..., :1], words[..., 1:]
    x = keys.astype(np.uint32) ^ first
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = x ^ (x >> 13) ^ second
    x = (x ^ (x >> 16)) * np.uint32(0xC2B2AE35)
    x = x ^ (x >> 16)
    uniform = ((x >> 9) + 0.5) / 2.0**23
    return uniform, -np.log(-np.log1p(-uniform))


def whole_prompt(tokens: int, **more: Any) -> dict[str, Any]:
    at, valid = jnp.arange(tokens)[None], jnp.ones((1, tokens), bool)
    return {"query_positions": at, "key_positions": at, "query_valid": valid, "key_valid": valid, "scale": 0.25} | more


def prompt(tokens: int, heads: int) -> tuple[jax.Array, jax.Array]:
    q_key, k_key = jax.random.split(jax.random.key(0))
    return jax.random.normal(q_key, (1, heads, GROUPS, tokens, 8)), jax.random.normal(k_key, (1, heads, tokens, 8))


def test_draws_are_those_of_the_definition() -> None:
    """Integers bit by bit; logarithms to about a unit in the last place of float32, far out as well."""
    noise, queries, keys = noise_of(7, [3, 0]), np.arange(90, 98), np.arange(1 << 15)
    uniform, expected = transcribed(noise, queries, keys)
    assert uniform.min() < 2**-17 and uniform.max() > 1 - 2**-17
    drawn = draws(noise, queries[None], keys[None])[0].reshape(expected.shape)
    np.testing.assert_allclose(drawn, expected, rtol=2**-23, atol=3e-7)


def test_draws_do_not_depend_on_how_the_work_is_cut() -> None:
    """Heads on other shards, queries in other chunks, keys in other slots, other rows of a batch: the same draws."""
    rng = np.random.default_rng(1)
    at = jax.jit(lambda noise, queries, keys: noise.at(queries, keys, GROUPS), compiler_options=QUICK)
    queries, keys, heads = np.tile(np.arange(20, 60), (2, 1)), np.tile(np.arange(64), (2, 4, 1)), np.arange(4)
    whole = np.asarray(at(noise_of(3, heads), queries, keys))
    np.testing.assert_array_equal(whole[0], whole[1])
    moved = [rng.permutation(heads), rng.permutation(40), rng.permutation(64)]
    other = at(noise_of(3, moved[0]), queries[:, moved[1]], keys[:, :, moved[2]])
    np.testing.assert_array_equal(other[0], whole[0][np.ix_(moved[0], range(GROUPS), *moved[1:])])
    assert (at(noise_of(4, heads), queries, keys) != whole).mean() > 0.99


def test_draws_are_gumbel_and_independent() -> None:
    """Each bound is missed by truly independent draws once in a thousand times at most."""
    queries, keys = 256, 512
    uniform, drawn = transcribed(noise_of(11, [0, 1]), np.arange(queries), np.arange(keys))
    ordered = np.sort(uniform.ravel())
    distance = np.abs(ordered - (np.arange(ordered.size) + 0.5) / ordered.size).max()
    assert distance < 1.95 / np.sqrt(ordered.size)  # Kolmogorov and Smirnov
    z = (drawn - np.euler_gamma) / (np.pi / np.sqrt(6))
    for a, b in ((z[:, :, 1:], z[:, :, :-1]), (z[:, 1:], z[:, :-1]), (z[1:], z[:-1])):  # keys, queries, heads
        assert abs((a * b).mean()) < 3.3 / np.sqrt(a.size)  # a normal distribution, of so many
    # Of all pairs of queries of a head. Bernstein: a mean of n independent products of two uniforms on [-1/2, 1/2]
    # (variance 1/144, magnitude 1/4 at most) exceeds r / 12 with a probability below 2 exp(-n r^2 / (2 + 2 r)).
    centred = uniform - 0.5
    correlation = np.abs(12 / keys * centred @ centred.swapaxes(1, 2))[:, *np.triu_indices(queries, 1)]
    r = correlation.max()
    assert 2 * correlation.size * np.exp(-keys * r**2 / (2 + 2 * r)) > 1e-3


def test_keyformer_scores_are_a_softmax_of_noisy_logits() -> None:
    """softmax((x + noise) / tau) over the keys of a query, summed over queries, written from the equations in NumPy."""
    tokens, tau = 30, 1.5
    (q, k), noise = prompt(tokens, heads=2), noise_of(7, [4, 5])
    named = whole_prompt(tokens, noise=noise, temperature=jnp.full((1, tokens), 1 / tau))
    mass, lse = jitted(attention_mass, q, k, None, **named, return_lse=True)

    zeta = transcribed(noise, np.arange(tokens), np.arange(tokens))[1].reshape(1, 2, GROUPS, tokens, tokens)
    x = np.einsum("bkgth,bksh->bkgts", *(np.asarray(x, np.float64) for x in (q, k))) * 0.25
    y = np.where(np.tri(tokens, dtype=bool), (x + zeta) / tau, -np.inf)
    total = np.log(np.exp(y).sum(-1))
    np.testing.assert_allclose(lse, total, atol=1e-5)
    np.testing.assert_allclose(mass, np.exp(y - total[..., None]).sum((2, 3)), rtol=2e-5)


def test_scores_of_a_prompt_are_those_of_its_tokens_one_by_one() -> None:
    """So decoding goes on as prefill began, in a cache whose slots are in any order."""
    tokens = 24
    (q, k), noise = prompt(tokens, heads=2), noise_of(2, [0, 1])
    named = whole_prompt(tokens, noise=noise)
    order = np.random.default_rng(0).permutation(tokens)

    def step(masses: jax.Array, t: jax.Array) -> tuple[jax.Array, None]:
        one = jax.lax.dynamic_slice_in_dim(q, t, 1, axis=3)
        mine: dict[str, Any] = {"query_positions": t[None, None], "query_valid": jnp.ones((1, 1), bool)}
        mine["key_positions"] = jnp.asarray(order)[None]
        mass = attention_mass(one, k[:, :, order], None, **(named | mine))
        return jax.tree.map(jnp.add, masses, mass), None

    masses, _ = jitted(lambda: jax.lax.scan(step, jnp.zeros((1, 2, tokens)), jnp.arange(tokens)))
    whole = jitted(attention_mass, q, k, None, **named)
    np.testing.assert_allclose(masses, whole[:, :, order], rtol=1e-5)


@pytest.mark.parametrize("noisy", [False, True])
def test_masses_of_parts_add_up_under_a_joint_softmax(noisy: bool) -> None:
    """Keys in two sets: each gives its own lse, the merged one goes back in (streaming prefill beside a cache)."""
    tokens, cut = 40, 16
    q, k = prompt(tokens, heads=1)
    named = whole_prompt(tokens, noise=noise_of(5, [0]) if noisy else None)
    whole, expected = jitted(attention_mass, q, k, None, **named, return_lse=True)

    def part(keys: slice, lse: jax.Array | None, **more: Any) -> Any:
        mine = {"key_positions": named["key_positions"][:, keys], "key_valid": named["key_valid"][:, keys]}
        return attention_mass(q, k[:, :, keys], lse, **(named | mine), **more)

    def joined() -> tuple[jax.Array, jax.Array]:
        sides = (slice(0, cut), slice(cut, None))
        joint = jnp.logaddexp(*(part(side, None, return_lse=True)[1] for side in sides))
        return joint, jnp.concatenate([part(side, joint) for side in sides], axis=-1)

    joint, masses = jitted(joined)
    np.testing.assert_allclose(joint, expected, atol=1e-5)
    np.testing.assert_allclose(masses, whole, atol=1e-5)
