"""The whole path once, small: load, generate, compare, save, train. Also run on a newer Python with the newest jax."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kvjax

pytestmark = pytest.mark.smoke

TEXT = "import os\n\n\nclass Reader:\n    def __init__(self, path):\n        self.path = path\n\n    def read(self):\n"
NEW_TOKENS = 8


@pytest.fixture(scope="module")
def model():
    return kvjax.load("reference")


@pytest.fixture(scope="module")
def uncached(model):
    """Greedy tokens by running the whole text again for each: no cache at all."""
    prompt = model.tokenizer.encode(TEXT)
    tokens = jnp.zeros((1, len(prompt) + NEW_TOKENS), jnp.int32).at[0, : len(prompt)].set(jnp.asarray(prompt))
    forward = jax.jit(lambda tokens: model.apply(tokens)[0])
    for place in range(len(prompt), len(prompt) + NEW_TOKENS):
        tokens = tokens.at[0, place].set(jnp.argmax(forward(tokens)[0, place - 1]))
    return prompt, np.asarray(tokens[0, len(prompt) :]).tolist()


def test_a_full_cache_generates_what_no_cache_does(model, uncached):
    prompt, expected = uncached
    made = kvjax.generate(model, prompt, max_new_tokens=NEW_TOKENS, stop=(), dtype="float32")
    assert made.tokens == [expected]


@pytest.mark.parametrize("method", ["kivi-2", "h2o:tokens=48+int4"])
def test_methods_generate(model, uncached, method):
    made = kvjax.generate(model, [uncached[0], uncached[0][:20]], method=method, max_new_tokens=NEW_TOKENS, stop=())
    assert [len(row) for row in made.tokens] == [NEW_TOKENS, NEW_TOKENS]
    assert np.isfinite(made.context.logits).all()


def test_a_saved_cache_goes_on_like_the_live_one(model, tmp_path):
    context = kvjax.prefill(model, TEXT, method="kivi-4", reserve=32)
    kvjax.save_cache(context, tmp_path / "cache")
    again = kvjax.load_cache(tmp_path / "cache")
    answers = [kvjax.generate(model, "        return", cache=c, max_new_tokens=4).tokens for c in (context, again)]
    assert answers[0] == answers[1]


@pytest.mark.slow
def test_a_comparison_measures_every_method_on_every_task(model):
    found = kvjax.compare(model, ["int4"], ["kv"], context=256, seeds=1, examples=2, batch=2)
    rows = {row.method: row for row in found.rows}
    assert rows.keys() == {"full", "random", "streaming_llm", "int4"}
    assert all(row.score is not None and row.cache_bytes > 0 and row.decode_ms_per_token for row in rows.values())
    assert rows["int4"].cache_bytes < rows["full"].cache_bytes / 2


def test_a_training_step_lowers_the_loss(model):
    """Three steps on one batch, from the shipped parameters with noise on them."""
    tokens = jnp.asarray(model.tokenizer.encode(TEXT))[None]

    def loss(params):
        logits, _ = model.module.apply({"params": params}, tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    noise = jax.random.key(0)
    params = jax.tree.map(lambda x: x + 0.05 * jax.random.normal(noise, x.shape), jax.device_get(model.params))
    optimizer = optax.adam(1e-3)
    state = optimizer.init(params)
    step = jax.jit(jax.value_and_grad(loss))
    losses = []
    for _ in range(3):
        value, gradient = step(params)
        updates, state = optimizer.update(gradient, state)
        params = optax.apply_updates(params, updates)
        losses.append(float(value))
    assert losses[2] < losses[1] < losses[0]


def test_an_exported_model_is_the_same_model(model, tmp_path):
    again = kvjax.load(kvjax.export(model, tmp_path / "exported"))
    assert again.config == model.config
    equal = jax.tree.map(lambda a, b: bool((a == b).all()), model.params, again.params)
    assert all(jax.tree.leaves(equal))
