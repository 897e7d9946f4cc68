"""Fewer kv heads for a trained image classifier, by the mean (Ainslie et al., 2023, arXiv 2305.13245)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.convert.heads import pooled
from kvjax.errors import UsageError
from kvjax.models.vision_config import VisionConfig
from kvjax.typing import PyTree


def mean_heads(config: VisionConfig, params: PyTree, heads: int) -> tuple[VisionConfig, PyTree]:
    """The classifier with `heads` kv heads, each the mean of K / `heads` in a row: their weights and their biases.

    Decoders have `kvjax.convert.mha_to_gqa`, which knows better ways too. A mean forgets what is different between the
    heads, so accuracy is low until the model is trained a little more.

    Args:
      params: of `VisionTransformer(config)`, whose mixer has projections `k` and `v` of K heads.
      heads: K', a divisor of K.

    Returns:
      The config with `num_kv_heads` = K', and its parameters: those that are not pooled are shared with `params`.

    Raises:
      UsageError: K' does not divide K, or layers without such projections.
    """
    if heads < 1 or config.num_kv_heads % heads:
        raise UsageError(f"mean_heads: {config.num_kv_heads} kv heads are not a multiple of {heads}; choose a divisor.")
    names = [f"layers_{layer}" for layer in range(config.num_layers)]
    if not all({"k", "v"} <= set(params[name]["attention"]) for name in names):
        raise UsageError(f"mean_heads: the layers of a {type(config.mixer).__name__} have no keys and values to pool.")
    new = dict(params)
    for name in names:
        attention = params[name]["attention"]
        fewer = {part: _mean(attention[part], heads) for part in ("k", "v")}
        new[name] = {**params[name], "attention": {**attention, **fewer}}
    return dataclasses.replace(config, num_kv_heads=heads), new


def _mean(projection: PyTree, heads: int) -> PyTree:
    """In float32, and back."""
    means = pooled(jax.tree.map(lambda x: np.asarray(x, np.float32), dict(projection)), heads)
    return {name: jnp.asarray(x, projection[name].dtype) for name, x in means.items()}
