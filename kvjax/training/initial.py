"""Initial parameters with a rough induction circuit in them, so that recall is learnt in minutes.

From ordinary initial values a small decoder with rotary embedding stays for millions of tokens on the plateau
"some value of this context" before it finds induction (Olsson et al., 2022, arXiv 2209.11895): one layer moves
each token's identity to its successor, the next finds the place whose moved identity is the current token and
copies what stands there. `planted` starts with both, roughly; everything is trained
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
    """How firmly the circuit is planted; the defaults hold for widths around 160 and head_dim 32.

    Attributes:
      embedding: standard deviation of the embeddings. With matrices scaled by their fan-in it must not be
        small, or the layers drown the tokens' identity.
      offset: added to every embedding. A direction that all tokens share is what a head needs to attend by
        position alone; the logits of a tied head do not change by it.
      residual: factor on the other output projections.
      previous: amplitude of query and key of the heads that look back by a fixed distance.
      moved: gains of the identities that they write, one head per distance 1, 2, …
      match: gain of the query and key that find the identity from distance 1.
      copied: gain of what the matching head writes.
    """

    embedding: float = 0.08
    offset: float = 0.04
    residual: float = 0.1
    previous: float = 2.5
    moved: tuple[float, ...] = (0.3,)
    match: float = 4.0
    copied: float = 0.8


def planted(params: PyTree, config: TransformerConfig, seed: int, strength: Strength = Strength()) -> PyTree:
    """Initial parameters of a `Transformer` with an induction circuit in its first two layers.

    Args:
      params: what `Transformer(config).init` gave, float32; the arrays that this does not plant are kept.
      config: at least two layers and rotary embedding; the other bounds are in the error.
      seed: of the random directions.

    Returns a new tree of the same shapes. Raises UsageError when the circuit does not fit.
    """
    distances = len(strength.moved)
    group = config.num_heads // config.num_kv_heads
    least = (distances + 1) * config.head_dim + 1
    if config.num_layers < 2 or config.rope is None or config.embed_dim < least or group < distances:
        raise UsageError(
            f"an induction circuit with {distances} distances needs 2 layers, rotary embedding, embed_dim >= {least} "
            f"and {distances} query heads per kv head; got {config.num_layers} layers, embed_dim {config.embed_dim}, "
            f"{group} query heads per kv head"
        )
    tree = jax.tree.map(lambda leaf: np.array(leaf, np.float32), params)
    rng = np.random.default_rng([seed, config.embed_dim])
    table = tree["embed"]["embedding"]
    table[:] = rng.normal(strength.offset, strength.embedding, table.shape)
    for layer in range(config.num_layers):
        tree[f"layers_{layer}"]["attention"]["o"]["kernel"] *= strength.residual
        tree[f"layers_{layer}"]["mlp"]["down"]["kernel"] *= strength.residual
    here, *back = np.split(_directions(rng, config.embed_dim, least - 1), distances + 1, axis=1)
    _plant_previous(tree["layers_0"]["attention"], config, strength, here, back)
    _plant_match(rng, tree["layers_1"]["attention"], config, strength, here, back[0])
    return jax.tree.map(jnp.asarray, tree)


def _plant_previous(
    attention: dict[str, Any], config: TransformerConfig, strength: Strength, here: np.ndarray, back: list[np.ndarray]
) -> None:
    """Query head i attends i + 1 tokens back; identity read along `here` [D, H] is written along `back[i]` [D, H]."""
    assert config.rope is not None
    pairs = config.head_dim // 2
    angle = np.asarray(config.rope.table(config.head_dim, jnp.int32(1)).inv_freq, np.float64)
    amplitude = np.where(np.arange(pairs) < pairs // 2, strength.previous, 0.0)
    shared = np.ones((config.embed_dim, 1)) / np.sqrt(config.embed_dim)
    attention["k"]["kernel"][:, 0] = shared * np.concatenate([amplitude, 0 * amplitude])
    attention["v"]["kernel"][:, 0] = here
    for head, (written, gain) in enumerate(zip(back, strength.moved, strict=True)):
        # Rotary embedding turns q by t and k by s: their product peaks where s - t cancels the angle set here.
        turned = np.concatenate([amplitude * np.cos((head + 1) * angle), -amplitude * np.sin((head + 1) * angle)])
        attention["q"]["kernel"][:, head] = shared * turned
        attention["o"]["kernel"][head] = gain * written.T


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
