"""A small decoder with random weights whose every token depends on what its cache holds."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np

from kvjax.models.config import TransformerConfig
from kvjax.models.language_model import LanguageModel
from kvjax.models.transformer import Transformer

CONFIG = TransformerConfig(
    vocab_size=64,
    embed_dim=32,
    num_layers=1,
    num_heads=8,
    num_kv_heads=4,
    head_dim=16,
    mlp_dim=64,
    max_positions=96,
)
PROMPTS = [np.random.default_rng(7).integers(0, CONFIG.vocab_size, n).tolist() for n in (29, 19, 26, 17)]


@functools.cache
def language_model() -> LanguageModel:
    """Weights larger than a new model has, so that attention is sharp and what is forgotten shows."""
    rng = np.random.default_rng(0)

    def draw(path: Any, struct: jax.ShapeDtypeStruct) -> jax.Array:
        x = rng.standard_normal(struct.shape, np.float32)
        return jnp.asarray(np.ones_like(x) if "norm" in str(path) else x if "embedding" in str(path) else 0.3 * x)

    shapes = jax.eval_shape(Transformer(CONFIG).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    return LanguageModel(CONFIG, jax.tree_util.tree_map_with_path(draw, shapes))


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """Yields a list that grows with everything that jax traces, lowers or compiles meanwhile."""
    seen: list[str] = []

    def listen(event: str, seconds: float, **_: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
