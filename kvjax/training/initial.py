"""Initial parameters with a rough induction circuit in them, so that recall is learnt in minutes.

From ordinary initial values a small decoder with rotary embedding stays for millions of tokens on the plateau
"some value of this context" before it finds induction (Olsson et al., 2022, arXiv 2209.11895): one layer moves
each token's identity to its successor, the next finds the place whose moved identity is the current token and
copies what stands there. `planted` starts with both, roughly, in one head per kv head; everything is trained
from there. (Structured initial attention weights: Trockman and Kolter, 2023, arXiv 2305.09828.)
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.errors import UsageError
from kvjax.models.config import TransformerConfig
from kvjax.typing import PyTree


@dataclasses.dataclass(frozen=True)
class Strength:
    """How firmly the circuit is planted; the defaults hold for widths around 160.

    Attributes:
      embedding: standard deviation of the embeddings. With matrices scaled by their fan-in it must not be
        small, or the layers drown the tokens' identity.
      offset: added to every embedding. A direction that all tokens share is what a head needs to attend by
        position alone; the logits of a tied head do not change by it.
      residual: factor on the other output projections.
      previous: amplitude of query and key of the head that looks at the previous token.
      moved: gain of the identity that this head writes.
      match: gain of the query and key that find it.
      copied: gain of what the matching head writes.
    """

    embedding: float = 0.08
    offset: float = 0.04
    residual: float = 0.1
    previous: float = 2.5
    moved: float = 0.3
    match: float = 4.0
    copied: float = 0.8


def planted(params: PyTree, config: TransformerConfig, seed: int, strength: Strength = Strength()) -> PyTree:
    """Initial parameters of a `Transformer` with an induction circuit in its first two layers.

    Args:
      params: what `Transformer(config).init` gave, float32; the arrays that this does not plant are kept.
      config: at least two layers, rotary embedding, and 2 * head_dim < embed_dim.
      seed: of the random directions.

    Returns a new tree of the same shapes. Raises UsageError when the circuit does not fit.
    """
    if config.num_layers < 2 or config.rope is None or 2 * config.head_dim >= config.embed_dim:
        raise UsageError(
            f"an induction circuit needs two layers, rotary embedding and embed_dim > 2 * head_dim; got "
            f"{config.num_layers} layers, embed_dim {config.embed_dim}, head_dim {config.head_dim}"
        )
    tree = jax.tree.map(lambda leaf: np.array(leaf, np.float32), params)
    rng = np.random.default_rng([seed, config.embed_dim])
    table = tree["embed"]["embedding"]
    table[:] = rng.normal(strength.offset, strength.embedding, table.shape)
    for layer in range(config.num_layers):
        tree[f"layers_{layer}"]["attention"]["o"]["kernel"] *= strength.residual
        tree[f"layers_{layer}"]["mlp"]["down"]["kernel"] *= strength.residual
    here, before = np.split(_directions(rng, config.embed_dim, 2 * config.head_dim), 2, axis=1)
    _plant_previous(tree["layers_0"]["attention"], config, strength, here, before)
    _plant_match(rng, tree["layers_1"]["attention"], config, strength, here, before)
    return jax.tree.map(jnp.asarray, tree)


def _plant_previous(
    attention: dict[str, Any], config: TransformerConfig, strength: Strength, here: np.ndarray, before: np.ndarray
) -> None:
    """Query head 0 attends to the token before; identity read along `here` [D, H] is written along `before`."""
    assert config.rope is not None
    pairs = config.head_dim // 2
    angle = np.asarray(config.rope.table(config.head_dim, jnp.int32(1)).inv_freq, np.float64)
    amplitude = np.where(np.arange(pairs) < pairs // 2, strength.previous, 0.0)
    shared = np.ones((config.embed_dim, 1)) / np.sqrt(config.embed_dim)
    # Rotary embedding turns q by t and k by s: their product peaks where s - t cancels the angle set here.
    attention["k"]["kernel"][:, 0] = shared * np.concatenate([amplitude, 0 * amplitude])
    attention["q"]["kernel"][:, 0] = shared * np.concatenate([amplitude * np.cos(angle), -amplitude * np.sin(angle)])
    attention["v"]["kernel"][:, 0] = here
    attention["o"]["kernel"][0] = strength.moved * before.T


def _plant_match(
    rng: np.random.Generator,
    attention: dict[str, Any],
    config: TransformerConfig,
    strength: Strength,
    here: np.ndarray,
    before: np.ndarray,
) -> None:
    """The first query head of each kv head seeks its token's identity among those written along `before`."""
    half = config.head_dim // 2
    slow = np.r_[half // 2 : half, half + half // 2 : 2 * half]  # pairs that hardly turn over the context
    for kv in range(config.num_kv_heads):
        head = kv * (config.num_heads // config.num_kv_heads)
        read = (np.arange(len(slow)) + kv * len(slow)) % config.head_dim
        copied = _directions(rng, config.embed_dim, config.head_dim)
        for name, index, along in (("q", head, here), ("k", kv, before)):
            kernel = attention[name]["kernel"]
            kernel[:, index] *= 0.1
            kernel[:, index, slow] = strength.match * along[:, read]
        attention["v"]["kernel"][:, kv] = copied
        attention["o"]["kernel"][head] = strength.copied * copied.T


def _directions(rng: np.random.Generator, size: int, count: int) -> np.ndarray:
    """Random orthonormal columns [size, count], orthogonal to the direction that all embeddings share."""
    draws = rng.normal(size=(size, count))
    return np.linalg.qr(draws - draws.mean(axis=0))[0]
