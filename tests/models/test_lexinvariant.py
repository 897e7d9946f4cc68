"""Embeddings that each sequence draws: the cache keeps the draw, rows have their own, names of tokens mean nothing."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.engine.prefill import Context, prefill
from kvjax.errors import UsageError
from kvjax.models import embedding
from kvjax.models.config import TransformerConfig
from kvjax.models.embedding import DrawnEmbedding, drawn
from kvjax.models.language_model import LanguageModel
from kvjax.models.transformer import Transformer

V, D = 24, 32
CONFIG = TransformerConfig(
    vocab_size=V,
    embed_dim=D,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=32,
    max_positions=64,
    tied_embeddings=True,
    embedding=DrawnEmbedding(),
)
PROMPTS = [np.random.default_rng(1).integers(0, V, n).tolist() for n in (13, 6)]
LATER = np.random.default_rng(2).integers(0, V, (2, 3)).astype(np.int32)
DRAWS = (5, 2**32 - 1)


@functools.cache
def model(config: TransformerConfig = CONFIG) -> LanguageModel:
    draws = jnp.zeros(1, jnp.uint32)
    params = Transformer(config).init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32), draws=draws)["params"]
    return LanguageModel(config, params)


def whole(tokens: list[int], draw: int) -> jax.Array:
    """Logits [T, V] of one row, uncached."""
    return _whole(jnp.asarray([tokens]), jnp.asarray([draw], jnp.uint32))[0]


@jax.jit
def _whole(tokens: jax.Array, draws: jax.Array) -> jax.Array:
    return model().apply(tokens, draws=draws)[0]


def test_there_is_no_table_among_the_parameters() -> None:
    assert not {"embed", "head"} & set(model().params)
    assert model().dtype == jnp.float32


@pytest.mark.parametrize("method", ["full", "streaming_llm:tokens=40"])
def test_decoding_meets_the_embeddings_of_the_prompt(method: str, tmp_path) -> None:
    context = kvjax.prefill(model(), PROMPTS, method, reserve=8, dtype="float32", draws=DRAWS)
    kvjax.save_cache(context, tmp_path / "cache")
    loaded = kvjax.load_cache(tmp_path / "cache")
    assert isinstance(loaded, Context)
    np.testing.assert_array_equal(loaded.cache.draws, np.array(DRAWS, np.uint32))
    questions = [row.tolist() for row in LATER]
    first = kvjax.generate(model(), questions, cache=context.fork(), max_new_tokens=4, stop=())
    again = kvjax.generate(model(), questions, cache=loaded, max_new_tokens=4, stop=(), seed=9)
    assert first.tokens == again.tokens
    for b, prompt in enumerate(PROMPTS):
        text = [*prompt, *questions[b], *first.tokens[b]]
        logits = whole(text, DRAWS[b])
        np.testing.assert_allclose(context.logits[b], logits[len(prompt) - 1], atol=1e-4)
        np.testing.assert_allclose(first.context.logits[b], logits[-1], atol=1e-4)
        start = len(prompt) + len(questions[b])
        assert first.tokens[b] == np.argmax(logits[start - 1 : -1], axis=-1).tolist()


def test_another_draw_gives_another_result_and_rows_draw_by_themselves() -> None:
    same = [PROMPTS[0], PROMPTS[0], PROMPTS[0]]
    counted = prefill(model(), same, kvjax.methods.full(), reserve=4, draws=7)
    np.testing.assert_array_equal(counted.cache.draws, np.array([7, 8, 9], np.uint32))
    named = prefill(model(), same, kvjax.methods.full(), reserve=4, draws=(8, 7, 8))
    first, second, third = named.logits
    np.testing.assert_allclose(first, third, atol=1e-6)
    assert np.abs(first - second).max() > 0.1
    np.testing.assert_allclose(second, counted.logits[0], atol=1e-6)
    np.testing.assert_allclose(first, counted.logits[1], atol=1e-6)


def test_embeddings_are_unit_normal_vectors_of_their_token_and_draw() -> None:
    table = np.asarray(drawn(jnp.uint32(3), jnp.arange(400), 64))
    assert np.linalg.norm(table, axis=1).mean() == pytest.approx(1, abs=0.02)
    assert table.mean() == pytest.approx(0, abs=0.003) and (8 * table).std() == pytest.approx(1, abs=0.02)
    apart = table @ table.T - np.diag(np.square(table).sum(1))
    assert apart.std() == pytest.approx(64**-0.5, rel=0.05), "noise of D ** -0.5"
    np.testing.assert_array_equal(table[[7, 3]], drawn(jnp.uint32(3), jnp.array([7, 3]), 64))
    other = np.asarray(drawn(jnp.uint32(4), jnp.arange(400), 64))
    assert np.abs(np.sum(table * other, axis=1)).mean() < 0.2


def test_logits_do_not_depend_on_blocks_of_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = whole(PROMPTS[0], 5)
    monkeypatch.setattr(embedding, "BLOCK", 7)
    found = jax.jit(lambda tokens: model().apply(tokens, draws=jnp.array([5], jnp.uint32))[0])
    np.testing.assert_allclose(found(jnp.asarray(PROMPTS[:1]))[0], expected, atol=1e-5)


def test_renaming_tokens_renames_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact for a draw whose embeddings are renamed too; and all draws of a token are alike, so the law is the same."""
    rename = np.random.default_rng(3).permutation(V)
    renamed = [int(rename[token]) for token in PROMPTS[0]]
    expected = whole(PROMPTS[0], 5)
    back = jnp.asarray(np.argsort(rename), jnp.int32)

    def swapped(draw: Any, tokens: Any, size: int) -> jax.Array:
        return drawn(draw, back[tokens % V], size)

    monkeypatch.setattr(embedding, "drawn", swapped)
    found = jax.jit(lambda tokens: model().apply(tokens, draws=jnp.array([5], jnp.uint32))[0])
    np.testing.assert_allclose(found(jnp.asarray([renamed]))[0][:, rename], expected, atol=1e-5)


def test_the_mean_over_draws_does_not_know_the_names() -> None:
    """Over 2000 draws: the mean logit of the token that was asked about, whatever it is called."""
    draws = jnp.arange(2000, dtype=jnp.uint32)
    rows = [[1, 2, 3, 1, 2], [9, 4, 20, 9, 4]]
    run = jax.jit(lambda tokens: model().apply(jnp.broadcast_to(tokens, (2000, 5)), draws=draws)[0][:, -1])
    (one, other) = (np.asarray(run(jnp.asarray(row))) for row in rows)
    for a, b in zip(rows[0], rows[1], strict=True):
        assert abs(one[:, a].mean() - other[:, b].mean()) < 4 * np.hypot(one[:, a].std(), other[:, b].std()) / 2000**0.5
    told = one[:, 2] - one[:, 5]
    assert told.mean() > 10 * told.std() / 2000**0.5, "the last token says something about the logits"


def test_an_exported_model_comes_back(tmp_path) -> None:
    again = kvjax.load(kvjax.export(model(), tmp_path / "model"))
    assert again.config == CONFIG
    jax.tree.map(np.testing.assert_array_equal, again.params, model().params)


def test_what_is_missing_is_said() -> None:
    with pytest.raises(UsageError, match="tied_embeddings"):
        dataclasses.replace(CONFIG, tied_embeddings=False)
    with pytest.raises(UsageError, match="draws is uint32"):
        model().apply(jnp.zeros((1, 3), jnp.int32))
    with pytest.raises(UsageError, match="one uint32 number per row"):
        model().apply(jnp.zeros((1, 3), jnp.int32), draws=jnp.zeros(2, jnp.uint32))
    with pytest.raises(UsageError, match="learnt"):
        plain = dataclasses.replace(CONFIG, embedding=None)
        Transformer(plain).init(jax.random.key(0), jnp.zeros((1, 3), jnp.int32), draws=jnp.zeros(1, jnp.uint32))
    with pytest.raises(UsageError, match="2 draws for 1 rows"):
        kvjax.prefill(model(), PROMPTS[:1], reserve=4, draws=(1, 2))
    with pytest.raises(UsageError, match="dtype is one of"):
        DrawnEmbedding("int8")
