"""Initial parameters with rough induction circuits in them, so that recall is learnt in minutes.

From ordinary initial values a small decoder with rotary embedding stays for millions of tokens on the plateau
"some value of this context" before it finds induction (Olsson et al., 2022, arXiv 2209.11895): one layer moves
each token's identity to its successor, the next finds the place whose moved identity is the current token and
copies what stands there. `planted` starts with both, roughly, and in a third layer with the same for the token
before the current one, so that keys of two tokens match by both. Everything is trained from there. (Structured
initial attention weights: Trockman and Kolter, 2023, arXiv 2305.09828.)
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
    """How firmly the circuits are planted; the defaults hold for widths around 160 and head_dim 32.

    Attributes:
      embedding: standard deviation of the embeddings. With matrices scaled by their fan-in it must not be
        small, or the layers drown the tokens' identity.
      offset: added to every embedding. A direction that all tokens share is what a head needs to attend by
        position alone; the logits of a tied head do not change by it.
      residual: factor on the other output projections.
      previous: amplitude of query and key of the heads that look back by a fixed distance.
      moved: gains of the identities that they write, for the distances 1 and 2.
      match: gain of the queries and keys that find an identity.
      copied: gains of what the matching heads of the second and of the third layer write.
    """

    embedding: float = 0.08
    offset: float = 0.04
    residual: float = 0.1
    previous: float = 2.5
    moved: tuple[float, float] = (0.3, 0.15)
    match: float = 4.0
    copied: tuple[float, float] = (0.8, 0.4)


def planted(params: PyTree, config: TransformerConfig, seed: int, strength: Strength = Strength()) -> PyTree:
    """Initial parameters of a `Transformer` with induction circuits in its first two (and third) layers.

    Args:
      params: what `Transformer(config).init` gave, float32; the arrays that this does not plant are kept.
      config: at least two layers and rotary embedding; the other bounds are in the error.
      seed: of the random directions.

    Returns a new tree of the same shapes. Raises UsageError when the circuits do not fit.
    """
    least = 3 * config.head_dim + 1
    group = config.num_heads // config.num_kv_heads
    if config.num_layers < 2 or config.rope is None or config.embed_dim < least or group < 2:
        raise UsageError(
            f"induction circuits need 2 layers, rotary embedding, embed_dim >= {least} and 2 query heads per kv head; "
            f"got {config.num_layers} layers, embed_dim {config.embed_dim}, {group} query heads per kv head"
        )
    tree = jax.tree.map(lambda leaf: np.array(leaf, np.float32), params)
    rng = np.random.default_rng([seed, config.embed_dim])
    table = tree["embed"]["embedding"]
    table[:] = rng.normal(strength.offset, strength.embedding, table.shape)
    layers = [tree[f"layers_{index}"] for index in range(config.num_layers)]
    for layer in layers:
        layer["attention"]["o"]["kernel"] *= strength.residual
        layer["mlp"]["down"]["kernel"] *= strength.residual
    here, *back = np.split(_directions(rng, config.embed_dim, least - 1), 3, axis=1)
    _plant_back(layers[0]["attention"], config, strength, here, back)
    circuits = zip(layers[1:3], [(here, back[0]), (back[0], back[1])], strength.copied, strict=False)
    for layer, (seeks, among), gain in circuits:
        _plant_match(rng, layer["attention"], config, strength.match, seeks, among, gain)
    return jax.tree.map(jnp.asarray, tree)


def _plant_back(
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
    match: float,
    seeks: np.ndarray,
    among: np.ndarray,
    gain: float,
) -> None:
    """The first query head of each kv head seeks its identity along `seeks` among those along `among`, and copies."""
    half = config.head_dim // 2
    slow = np.r_[half // 2 : half, half + half // 2 : 2 * half]  # pairs that hardly turn over the context
    for kv in range(config.num_kv_heads):
        head = kv * (config.num_heads // config.num_kv_heads)
        read = (np.arange(len(slow)) + kv * len(slow)) % config.head_dim
        copied = _directions(rng, config.embed_dim, config.head_dim)
        for name, index, along in (("q", head, seeks), ("k", kv, among)):
            kernel = attention[name]["kernel"]
            kernel[:, index] *= 0.1
            kernel[:, index, slow] = match * along[:, read]
        attention["v"]["kernel"][:, kv] = copied
        attention["o"]["kernel"][head] = gain * copied.T


def _directions(rng: np.random.Generator, size: int, count: int) -> np.ndarray:
    """Random orthonormal columns [size, count], orthogonal to the direction that all embeddings share."""
    draws = rng.normal(size=(size, count))
    return np.linalg.qr(draws - draws.mean(axis=0))[0]
