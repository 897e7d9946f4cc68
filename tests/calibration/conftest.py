"""A tiny random model with the shipped tokenizer, and a text that is long enough for it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from kvjax.assets import REFERENCE, heldout_text
from kvjax.models.config import TransformerConfig
from kvjax.models.language_model import LanguageModel
from kvjax.models.tokenizer import load_tokenizer
from kvjax.models.transformer import Transformer

CONFIG = TransformerConfig(
    vocab_size=1024,
    embed_dim=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    mlp_dim=64,
    max_positions=192,
    tied_embeddings=True,
)


def build(seed: int) -> LanguageModel:
    """Weights larger than at initialisation, so that attention is peaked and methods differ."""
    params = Transformer(CONFIG).init(jax.random.key(seed), jnp.zeros((1, 2), jnp.int32))["params"]
    params = jax.tree.map(lambda leaf: 3 * leaf if leaf.ndim > 1 else leaf, params)
    return LanguageModel(CONFIG, params, load_tokenizer(REFERENCE), "tiny")


@pytest.fixture(scope="session")
def model() -> LanguageModel:
    return build(0)


@pytest.fixture(scope="session")
def text() -> str:
    return heldout_text()[:8000]
