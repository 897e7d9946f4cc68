"""Training after a conversion: what is trained, what is merged, and that it is of use."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.attention import ProjectedKeys
from kvjax.convert.recover import Recovery, mean_surprisal, merged, recover
from kvjax.errors import UsageError
from kvjax.models.config import TransformerConfig
from kvjax.models.language_model import LanguageModel
from kvjax.models.transformer import Transformer

CONFIG = TransformerConfig(
    vocab_size=11,
    embed_dim=16,
    num_layers=1,
    num_heads=2,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=16,
    max_positions=16,
    attention=ProjectedKeys(1),
    tied_embeddings=True,
)
TOKENS = (np.arange(12)[None] * np.array([[1], [2], [3], [4]]) % 11).astype(np.int32)
LENGTHS = np.array([12, 12, 7, 9], np.int32)


def make(dtype: Any = jnp.float32) -> LanguageModel:
    params = jax.jit(Transformer(CONFIG, dtype).init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    return LanguageModel(CONFIG, params)


def loss(model: LanguageModel) -> float:
    return float(mean_surprisal(model.module, model.params, jnp.asarray(TOKENS), jnp.asarray(LENGTHS)))


def changed(model: LanguageModel, other: LanguageModel) -> set[str]:
    flat = zip(*(jax.tree_util.tree_flatten_with_path(one.params)[0] for one in (model, other)), strict=True)
    return {jax.tree_util.keystr(path, simple=True, separator=".") for (path, a), (_, b) in flat if (a != b).any()}


def test_surprisal_counts_tokens_that_exist() -> None:
    model = make()
    logits = np.asarray(jax.jit(LanguageModel.apply)(model, jnp.asarray(TOKENS))[0], np.float64)
    nats = []
    for row, length in enumerate(LENGTHS):
        for t in range(length - 1):
            p = np.exp(logits[row, t] - logits[row, t].max())
            nats.append(-np.log(p[TOKENS[row, t + 1]] / p.sum()))
    np.testing.assert_allclose(loss(model), np.mean(nats), rtol=1e-5)


@pytest.mark.parametrize(("train", "dtype"), [("lora", jnp.float32), ("lora", jnp.bfloat16), ("all", jnp.float32)])
def test_the_loss_falls_and_nothing_is_added(train: Any, dtype: Any) -> None:
    model, seen = make(dtype), []
    how = Recovery(train, steps=25, rate=0.03, batch=2, rank=4)
    made = recover(model, TOKENS, LENGTHS, how, seen.append)
    assert made.config == model.config and jax.tree.structure(made.params) == jax.tree.structure(model.params)
    assert [x.dtype for x in jax.tree.leaves(made.params)] == [x.dtype for x in jax.tree.leaves(model.params)]
    assert len(seen) == 25 and loss(made) < loss(model) - 0.1
    again = recover(model, TOKENS, LENGTHS, how)
    assert not changed(made, again)
    kernels = {f"layers_0.attention.{name}.kernel" for name in "qkvo"}
    kernels |= {f"layers_0.mlp.{name}.kernel" for name in ("gate", "up", "down")}
    if train == "lora":
        assert changed(model, made) == kernels
    else:
        assert changed(model, made) > {*kernels, "embed.embedding", "layers_0.attention.key_basis"}


def test_the_change_has_the_rank_that_was_asked_for() -> None:
    model = make()
    made = recover(model, TOKENS, LENGTHS, Recovery("lora", steps=5, rate=0.02, batch=2, rank=2))
    for name, inputs in (("q", 16), ("o", 16)):
        before, after = (one.params["layers_0"]["attention"][name]["kernel"] for one in (model, made))
        values = np.linalg.svd(np.asarray(after - before, np.float64).reshape(inputs, -1), compute_uv=False)
        assert values[1] > 1e-4 and values[2] < 1e-5 * values[0] + 1e-6


def test_merging() -> None:
    """W + scale · A B, a kernel of several axes being the matrix from what it contracts to what it gives."""
    rng = np.random.default_rng(0)
    kernel, down, up = (rng.standard_normal(shape) for shape in ((2, 3, 5), (6, 2), (2, 5)))
    params = {"layers_0": {"o": {"kernel": jnp.asarray(kernel)}}, "x": jnp.ones(1)}
    adapters = {"layers_0/o/kernel": {"down": jnp.asarray(down), "up": jnp.asarray(up)}}
    expected = kernel + 0.5 * np.einsum("nhr,rd->nhd", down.reshape(2, 3, 2), up)
    found = merged(params, adapters, 0.5)
    np.testing.assert_allclose(found["layers_0"]["o"]["kernel"], expected, atol=1e-5)
    assert found["x"] is params["x"]


def test_every_row_is_seen_before_one_comes_again() -> None:
    from kvjax.convert.recover import _draws

    draws = _draws(TOKENS, LENGTHS, Recovery(batch=3))
    rows = np.concatenate([np.asarray(next(draws)[0]) for _ in range(4)])
    for start in (0, 4, 8):
        assert sorted(map(tuple, rows[start : start + 4])) == sorted(map(tuple, TOKENS))


@pytest.mark.parametrize("fields", [{"steps": 0}, {"batch": 0}, {"rank": 0}, {"rate": 0.0}])
def test_what_cannot_train_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="at least one step"):
        dataclasses.replace(Recovery(), **fields)
