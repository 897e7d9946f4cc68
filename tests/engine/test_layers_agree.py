"""Layers whose selectors share out what they read do so after every step that the engine takes (ActQKV)."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.cache import methods
from kvjax.cache.model_cache import ModelCache
from kvjax.engine.decode import DecodeState, decode
from kvjax.engine.prefill import extend, pad, prefill
from kvjax.engine.sampling import Sampler
from kvjax.models.language_model import LanguageModel
from kvjax.models.transformer import Transformer
from tests.engine.driver import CONFIG, PROMPTS


@functools.cache
def model() -> LanguageModel:
    """Three layers, the later ones with sharper attention."""
    config = dataclasses.replace(CONFIG, num_layers=3)
    rng = np.random.default_rng(1)

    def draw(path: Any, struct: jax.ShapeDtypeStruct) -> jax.Array:
        name = jax.tree_util.keystr(path)
        x = rng.standard_normal(struct.shape, np.float32)
        scale = next((1.0 + i for i in range(3) if f"layers_{i}" in name and "'q'" in name), 0.3)
        return jnp.asarray(np.ones_like(x) if "norm" in name else x if "embedding" in name else scale * x)

    shapes = jax.eval_shape(Transformer(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    return LanguageModel(config, jax.tree_util.tree_map_with_path(draw, shapes))


def places(cache: ModelCache) -> np.ndarray:
    """int [L, B]."""
    return np.stack([layer.index.places[:, 0] for layer in cache])


def test_layers_read_as_much_together_as_they_would_alone() -> None:
    method = methods.actqkv(tokens=12, page=4, recent=4, sinks=1)
    context = prefill(model(), PROMPTS, method, reserve=24, chunk=8)
    after_prompt = places(context.cache)
    tokens, lengths = pad([[1, 2, 3, 4, 5, 6, 7, 8]] * 4, 8)
    context = extend(model(), context, tokens, lengths)
    after_question = places(context.cache)
    state = DecodeState(context.cache, context.logits, jnp.zeros(4, bool))
    state, _ = decode(model().module, Sampler(), (), 4, model().params, state, jax.random.key(0), 0, 3)
    moments = after_prompt, after_question, places(state.cache)
    for moment in moments:
        assert (moment.sum(0) == 9).all() and (moment != 3).any()
    assert len({moment.tobytes() for moment in moments}) == 3
