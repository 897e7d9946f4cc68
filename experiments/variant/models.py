"""The variants as values of one decoder, with as many parameters each."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from kvjax.attention import (
    DiffQKV,
    KeyDriven,
    KeyNorms,
    MultiHeadLatent,
    SelectiveAttention,
    SelfSelective,
)
from kvjax.errors import UsageError, unknown
from kvjax.models.config import RopeConfig, TransformerConfig
from kvjax.models.transformer import Transformer

Change = Callable[[TransformerConfig], dict[str, Any]]

LEADER = "gqa"
"""What the others' parameters and bytes are compared with."""

#: How each variant differs from the base, in which pairs of query heads with 16 channels share a kv head.
CHANGES: Mapping[str, Change] = MappingProxyType(
    {
        "mha": lambda start: {"num_kv_heads": start.num_heads},
        LEADER: lambda start: {},
        "mqa": lambda start: {"num_kv_heads": 1},
        "shared layers": lambda start: {"kv_layers": tuple(layer // 2 * 2 for layer in range(start.num_layers))},
        "diffqkv": lambda start: _fewer_keys(start, DiffQKV(value_heads=start.num_kv_heads)),
        "diffqkv, half keys": lambda start: _fewer_keys(
            start, DiffQKV(value_heads=start.num_kv_heads, key_dim=8, query_hidden=start.embed_dim * 3 // 2)
        ),
        "ssa": lambda start: {"attention": SelfSelective()},
        "selective": lambda start: {"attention": SelectiveAttention()},
        "mla": lambda start: {
            "num_kv_heads": start.num_heads,
            "attention": MultiHeadLatent(latent_dim=8 * start.num_kv_heads + 8, rotary_key_dim=8),
        },
        "kdgqa": lambda start: {"attention": KeyDriven(KeyNorms(per="example"))},
    }
)


def _fewer_keys(start: TransformerConfig, kind: DiffQKV) -> dict[str, Any]:
    return {"num_kv_heads": start.num_kv_heads // 2, "attention": kind}


def base(vocabulary: int, embed_dim: int, layers: int, context: int) -> TransformerConfig:
    """The decoder that all variants change: heads of 16 channels, a gated MLP, a tied head."""
    heads = embed_dim // 16
    return TransformerConfig(
        vocab_size=vocabulary,
        embed_dim=embed_dim,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads // 2,
        head_dim=16,
        mlp_dim=3 * embed_dim,
        max_positions=context,
        rope=RopeConfig(theta=10_000.0),
        tied_embeddings=True,
    )


def parameters(config: TransformerConfig) -> int:
    """How many there are."""
    shapes = jax.eval_shape(Transformer(config).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def variant(name: str, start: TransformerConfig) -> TransformerConfig:
    """A variant with the hidden layer that brings its parameters nearest to those of `LEADER`.

    Raises:
      UsageError: no such variant, or the sizes do not go with it.
    """
    if name not in CHANGES:
        raise unknown("variant", name, CHANGES)
    goal = parameters(dataclasses.replace(start, **CHANGES[LEADER](start)))
    config = dataclasses.replace(start, **CHANGES[name](start))
    per_unit = 3 * config.embed_dim * config.num_layers
    change = round((goal - parameters(config)) / per_unit)
    if config.mlp_dim + change < 1:
        raise UsageError(f"variant {name!r} has more parameters than {LEADER} beside its MLPs; use larger MLPs")
    return dataclasses.replace(config, mlp_dim=config.mlp_dim + change)
