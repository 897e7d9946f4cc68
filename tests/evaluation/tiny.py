"""A small model with the reference tokenizer, untrained."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from kvjax.assets import REFERENCE
from kvjax.models.config import RopeConfig, TransformerConfig
from kvjax.models.language_model import LanguageModel
from kvjax.models.tokenizer import load_tokenizer
from kvjax.models.transformer import Transformer


def tiny(sharpness: float = 1.0, name: str = "tiny", **changes: Any) -> LanguageModel:
    """Two layers, four query and two kv heads; matrices are `sharpness` times as large as at initialisation.

    changes: fields of the config that are other ones.
    """
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
    config = dataclasses.replace(config, **changes)
    draws = None if config.embedding is None else jnp.zeros(1, jnp.uint32)
    params = Transformer(config).init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32), draws=draws)["params"]
    params = jax.tree.map(lambda leaf: sharpness * leaf if leaf.ndim > 1 else leaf, params)
    return LanguageModel(config, params, load_tokenizer(REFERENCE), name)
