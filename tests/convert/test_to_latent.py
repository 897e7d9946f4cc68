"""Grouped-query attention made latent: exact where nothing is cut, and otherwise no worse than what was chosen."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.attention import GroupedQuery, MultiHeadLatent
from kvjax.attention.rope import Linear, Plain, Repeated, RopeConfig, Yarn
from kvjax.cache.methods import parse
from kvjax.cache.model_cache import ModelCache
from kvjax.convert import latent_factors as factors
from kvjax.convert.to_latent import input_moments, to_latent
from kvjax.engine.prefill import cache_dims
from kvjax.errors import UsageError
from kvjax.models.huggingface import export, load
from kvjax.models.language_model import LanguageModel
from tests.attention.decoding import TOKENS, assert_agree, config_of, model_of, through_cache, whole
from tests.oracles.rotary import rotate

N, K, H = 8, 4, 8
PLAIN: Any = {"num_kv_heads": K, "num_layers": 2}
BATCH = TOKENS, np.full(len(TOKENS), TOKENS.shape[1], np.int32)


def gqa(**changes: Any) -> LanguageModel:
    return model_of(config_of(GroupedQuery(), **(PLAIN | changes)))


@functools.cache
def logits(model: LanguageModel) -> np.ndarray:
    return whole(model)


def error(made: LanguageModel, model: LanguageModel) -> float:
    """Root mean square of the change of logits, over that of the logits."""
    return float(np.sqrt(np.mean((whole(made) - logits(model)) ** 2) / np.mean(logits(model) ** 2)))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"qkv_bias": True, "output_bias": True, "rope": RopeConfig(100.0, Yarn(4.0, 16)), "attention_scale": 0.5},
        {"kv_head_of_query": (0, 0, 2, 2, 2, 1, 3, 3), "windows": (5, None), "local_rope": RopeConfig(10.0)},
    ],
    ids=["plain", "biases, yarn, scale", "head map, windows"],
)
def test_all_heads_rotary_and_full_rank_is_the_same_function(changes: dict[str, Any]) -> None:
    model = gqa(**changes)
    made = to_latent(model, K * H, rotary_heads=K)
    kind = made.config.attention
    assert isinstance(kind, MultiHeadLatent) and kind.latent_dim + kind.rotary_key_dim == 2 * K * H
    assert error(made, model) < 2e-6


def test_without_rotary_embedding_one_head_is_exact_at_full_rank() -> None:
    model = gqa(rope=None)
    assert error(to_latent(model, (2 * K - 1) * H), model) < 2e-6


def test_slow_rotary_embedding_is_nearly_exact_at_full_rank() -> None:
    """Frequencies that turn nothing within the reach can leave the rotary key; what fast ones cost is not small."""
    fast = gqa()
    slow = gqa(rope=RopeConfig(10_000.0, Linear(1e5)))
    assert error(to_latent(slow, (2 * K - 1) * H, reach=24), slow) < 2e-3
    assert error(to_latent(fast, (2 * K - 1) * H, reach=24), fast) > 0.05


def test_more_of_either_loses_less() -> None:
    model = gqa()
    by_heads = [error(to_latent(model, (2 * K - m) * H, rotary_heads=m, text=[BATCH]), model) for m in (1, 3, 4)]
    by_rank = [error(to_latent(model, rank, rotary_heads=K, text=[BATCH]), model) for rank in (6, 16, 31)]
    assert by_heads[0] > by_heads[1] > by_heads[2] and by_rank[0] > by_rank[1] > by_rank[2] > 1e-4


def test_a_rotary_key_holds_as_much_of_the_keys_as_any_mix_of_heads() -> None:
    """Against a random unitary mix, and against taking one head as it is; power by the equation of the docstring."""
    rng = np.random.default_rng(0)
    keys = rng.standard_normal((32, K, H)) * np.array([1, 2, 0.5, 1])[:, None]
    inputs = rng.standard_normal((200, 32)) * np.linspace(0.1, 2, 32)
    moments = inputs.T @ inputs
    mixed = factors.mixes(keys, moments, 2)
    np.testing.assert_allclose(np.einsum("lmk,lnk->lmn", mixed, mixed.conj()), [np.eye(2)] * 4, atol=1e-12)

    def power(mix: np.ndarray) -> np.ndarray:
        found = np.einsum("lmk,tkl->tlm", mix, factors.as_complex(np.einsum("td,dkh->tkh", inputs, keys)))
        return (np.abs(found) ** 2).sum((0, 2))

    other = rng.standard_normal((4, K, K)) + 1j * rng.standard_normal((4, K, K))
    for rival in (np.linalg.qr(other)[0][:, :2], np.broadcast_to(np.eye(K)[[0, 1]], (4, 2, K))):
        assert (power(mixed) > power(rival)).all()


def test_mixes_of_heads_commute_with_rotation() -> None:
    """Products of turned queries and keys, head by head, are those with the shared key; the oracle turns both."""
    rng = np.random.default_rng(1)
    keys, queries, x = (rng.standard_normal(shape) for shape in ((6, K, H), (6, N, H), (2, 6)))
    reads = [0, 0, 1, 1, 2, 2, 3, 3]
    mixed = factors.mixes(keys, np.eye(6), K)
    shared = x[0] @ factors.rotary_keys(keys, mixed)
    wide = np.einsum("d,dnr->nr", x[1], factors.rotary_queries(queries, mixed, reads))
    k, q = (np.einsum("d,dkh->kh", one, w) for one, w in zip(x, (keys, queries), strict=True))

    def heads(wide: np.ndarray) -> list[np.ndarray]:
        """The K heads that a wide one is: pair (m, l) turns like pair l of a head."""
        low, high = (half.reshape(K, -1) for half in np.split(wide, 2))
        return list(np.concatenate([low, high], axis=1))

    for n, g in enumerate(reads):
        expected = rotate(q[n], 7, 50.0) @ rotate(k[g], 3, 50.0)
        pairs = zip(heads(wide[n]), heads(shared), strict=True)
        found = sum(rotate(a, 7, 50.0) @ rotate(b, 3, 50.0) for a, b in pairs)
        np.testing.assert_allclose(found, expected, atol=1e-12)


def test_the_mean_rotation_is_the_best_constant() -> None:
    """For logits of turned queries and keys at all distances below the reach, the oracle turning both."""
    rng, reach = np.random.default_rng(2), 9
    q, k = rng.standard_normal((2, 200, H))
    turn = factors.Turn(np.array([50.0 ** (-2 * i / H) for i in range(H // 2)]), 1.0)
    products = np.conj(factors.as_complex(q)) * factors.as_complex(k)
    exact = np.stack([np.sum(rotate(q, d, 50.0) * k, axis=-1) for d in range(reach)])

    def loss(constant: np.ndarray) -> float:
        return float(np.mean((exact - (products * constant).real.sum(-1)) ** 2))

    best, moved = turn.mean(reach), rng.standard_normal((8, H // 2)) + 1j * rng.standard_normal((8, H // 2))
    assert all(loss(best) < loss(best + 0.5 * step) for step in moved) and loss(best) < loss(np.ones(H // 2))


def test_repeated_frequencies() -> None:
    one, three = (
        c.table(h, jnp.int32(9)) for c, h in ((RopeConfig(30.0), 6), (RopeConfig(30.0, Repeated(Plain(), 3)), 18))
    )
    np.testing.assert_array_equal(three.inv_freq, np.tile(one.inv_freq, 3))


def test_text_says_which_inputs_there_are() -> None:
    model = gqa(qkv_bias=True)
    found = input_moments(model, [BATCH, BATCH])
    assert found is not None and found[0].shape == (33, 33)
    tokens = TOKENS.size
    np.testing.assert_allclose(found[0][-1, -1], 2 * tokens)
    np.testing.assert_allclose(np.trace(found[0][:-1, :-1]), 2 * tokens * 32, rtol=1e-4)
    short = gqa(), 12
    with_text, without = (error(to_latent(short[0], short[1], rotary_heads=K, text=t), short[0]) for t in ([BATCH], []))
    assert with_text < without


def test_it_decodes_like_it_reads_and_its_cache_is_smaller(tmp_path: Any) -> None:
    model = gqa()
    made = to_latent(model, 12, rotary_heads=2)
    prompt, later, _ = through_cache(made)
    assert_agree(made, whole(made), prompt, later)
    stores = []
    for one in (model, made):
        cache = ModelCache.init(parse("full"), cache_dims(one, 1, 64, 64))
        segments = (segment for layer in cache for segment in layer.segments)
        stores.append(sum(leaf.nbytes for segment in segments for leaf in jax.tree.leaves(segment.stores)))
    assert stores == [2 * 2 * 64 * 2 * K * H, 2 * 2 * 64 * (12 + 2 * H)]
    again = load(export(made, tmp_path / "made"))
    assert again.config == made.config
    np.testing.assert_array_equal(whole(again), whole(made))


def test_refusals() -> None:
    model = gqa()
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"latent_dim": 0}, "latent_dim is 1 to 56"),
        ({"latent_dim": 57}, "latent_dim is 1 to 56"),
        ({"latent_dim": 8, "rotary_heads": 5}, "rotary_heads is 1 to 4"),
        ({"latent_dim": 8, "reach": 0}, "reach"),
    )
    for bad, match in cases:
        with pytest.raises(UsageError, match=match):
            to_latent(model, **bad)
    with pytest.raises(UsageError, match="mha_to_gqa"):
        to_latent(gqa(qk_norm=True), 8)
    with pytest.raises(UsageError, match="only grouped-query"):
        to_latent(to_latent(model, 8), 8)
