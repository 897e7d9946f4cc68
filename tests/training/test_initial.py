"""The planted circuit copies what followed a token the last time, before any training."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.errors import UsageError
from kvjax.models.config import RopeConfig, TransformerConfig
from kvjax.models.transformer import Transformer
from kvjax.training.initial import planted

CONFIG = TransformerConfig(
    vocab_size=512,
    embed_dim=160,
    num_layers=2,
    num_heads=8,
    num_kv_heads=2,
    head_dim=32,
    mlp_dim=64,
    max_positions=64,
    rope=RopeConfig(theta=500_000.0),
    tied_embeddings=True,
)


def initial(config: TransformerConfig):
    return Transformer(config).init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]


@pytest.mark.slow
def test_untrained_induction():
    plain = initial(CONFIG)
    params = planted(plain, CONFIG, seed=0)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, plain)
    # Different random tokens, then half of them again in another order of pairs: the second of a pair is known.
    rng = np.random.default_rng(1)
    pairs = np.stack([rng.choice(512, 24, replace=False).reshape(12, 2) for _ in range(64)])
    again = np.stack([row[rng.permutation(12)] for row in pairs])
    tokens = jnp.asarray(np.concatenate([pairs, again], axis=1).reshape(64, 48))

    def among_top_ten(params) -> float:
        logits, _ = Transformer(CONFIG).apply({"params": params}, tokens)
        behind_first = logits[:, 24::2]
        wanted = jnp.take_along_axis(behind_first, tokens[:, 25::2, None], axis=-1)
        return float(jnp.mean(jnp.sum(behind_first > wanted, axis=-1) < 10))

    # By chance 10 / 512. Without the circuit only the tokens at hand are more likely than that.
    assert among_top_ten(plain) < 0.05
    assert among_top_ten(params) > 0.15


def test_a_circuit_that_does_not_fit_is_refused():
    for change in ({"num_layers": 1}, {"embed_dim": 96}, {"rope": None}, {"num_kv_heads": 8}):
        config = dataclasses.replace(CONFIG, **change)
        with pytest.raises(UsageError, match="embed_dim >= 97"):
            planted({}, config, seed=0)
