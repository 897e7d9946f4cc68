"""A tiny random model with the shipped tokenizer: accuracies are meaningless, everything else is real."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from kvjax.assets import REFERENCE
from kvjax.evaluation import contender, profile
from kvjax.evaluation.setting import Setting
from kvjax.evaluation.workload import Source
from kvjax.models.config import RopeConfig, TransformerConfig
from kvjax.models.language_model import LanguageModel
from kvjax.models.tokenizer import load_tokenizer
from kvjax.models.transformer import Transformer


@pytest.fixture(scope="session")
def model() -> LanguageModel:
    config = TransformerConfig(
        vocab_size=1024,
        embed_dim=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        mlp_dim=64,
        max_positions=256,
        rope=RopeConfig(),
        tied_embeddings=True,
    )
    params = Transformer(config).init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    # Larger than at initialisation, so that attention is peaked and methods differ.
    params = jax.tree.map(lambda leaf: 3 * leaf if leaf.ndim > 1 else leaf, params)
    return LanguageModel(config, params, load_tokenizer(REFERENCE), "tiny")


@pytest.fixture(scope="session")
def source(model: LanguageModel) -> Source:
    return Source(model)


@pytest.fixture(scope="session")
def setting() -> Setting:
    """The shapes of nearly all tests here, so that they share compiled programs."""
    return Setting(context=128, room=32, batch=2)


@pytest.fixture
def lone(monkeypatch) -> None:
    """No baselines besides the full cache."""
    monkeypatch.setattr(contender, "BASELINES", ("full",))


@pytest.fixture(autouse=True)
def few_repeats(monkeypatch) -> None:
    monkeypatch.setattr(profile, "REPEATS", 2)
