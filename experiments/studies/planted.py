"""What a small model lacks, planted into its weights such that what it computes with a full cache stays the same.

Each function takes a model whose queries and keys have no norm of their own, and gives one back that computes the same
function by another route. What a cache method then loses, it loses to what was planted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from kvjax.cache.policy import Prompt
from kvjax.calibration.observe import observe
from kvjax.errors import UsageError
from kvjax.models.language_model import LanguageModel
from kvjax.typing import Array, PyTree

OUTLIERS = 16.0
"""How much larger an outlier channel is than the others: a power of two, so that planting it rounds nothing."""


def outlier_channels(model: LanguageModel, factor: float = OUTLIERS, every: int = 8) -> LanguageModel:
    """Every eighth channel of the keys times `factor`, and of the queries divided by it; products stay the same.

    Both channels of a rotary pair are scaled alike, so that rotation commutes with it. With a power of two nothing is
    rounded: logits are the same to the last bit.
    """
    half = model.config.head_dim // 2
    pairs = np.where(np.arange(half) % every == every - 1, factor, 1.0)
    scale = jnp.asarray(np.tile(pairs, 2), model.dtype)

    def replanted(attention: PyTree) -> PyTree:
        return attention | {"q": _scaled(attention["q"], 1 / scale), "k": _scaled(attention["k"], scale)}

    return _with_attention(model, replanted, "outlier channels")


def unshared_heads(model: LanguageModel) -> LanguageModel:
    """Every query head gets a copy of the kv head that it reads: multi-head attention, with `G` times the kv heads.

    Keys of a layer are `G` times as wide then, with the rank that they had.
    """
    config = model.config
    group = config.num_heads // config.num_kv_heads
    owner = config.kv_head_of_query or tuple(n // group for n in range(config.num_heads))

    def replanted(attention: PyTree) -> PyTree:
        own = jax.tree.map(lambda leaf: leaf[..., jnp.asarray(owner), :], {"k": attention["k"], "v": attention["v"]})
        return attention | own

    wider = dataclasses.replace(config, num_kv_heads=config.num_heads, kv_head_of_query=None)
    return dataclasses.replace(_with_attention(model, replanted, "unshared heads"), config=wider)


def lazy_layers(model: LanguageModel, count: int | None = None, sharpness: float = 40.0) -> LanguageModel:
    """As many layers again (or `count`) on top that attend to the first token alone, and add nothing.

    The attention of large models is wide in the first layers and dwells on the first token in the others; few layers
    cannot differ like that. Queries of the new layers are a constant in one channel that rotary embedding hardly
    turns, keys are large there for the first token: `sharpness` is the logit.
    """
    config = model.config
    if config.windows:
        raise UsageError("lazy layers are planted into models without sliding windows")
    count = config.num_layers if count is None else count
    wider = dataclasses.replace(config, num_layers=config.num_layers + count, qkv_bias=True)
    params = {name: _biased(layer) if name.startswith("layers_") else layer for name, layer in model.params.items()}
    idle = jax.tree.map(jnp.zeros_like, params["layers_0"])
    idle |= {name: jax.tree.map(jnp.ones_like, part) for name, part in idle.items() if name.endswith("_norm")}
    params |= {f"layers_{config.num_layers + i}": idle for i in range(count)}
    deeper = dataclasses.replace(model, config=wider, params=params, name=f"{model.name}, lazy layers")
    q, k = _looks_at_the_first(deeper, sharpness)
    attention = idle["attention"] | {
        "q": {"kernel": idle["attention"]["q"]["kernel"], "bias": q},
        "k": {"kernel": k, "bias": idle["attention"]["k"]["bias"]},
    }
    lazy = idle | {"attention": attention}
    params = params | {f"layers_{config.num_layers + i}": lazy for i in range(count)}
    return dataclasses.replace(deeper, params=params)


def _looks_at_the_first(model: LanguageModel, sharpness: float) -> tuple[Array, Array]:
    """Bias of the queries [N, H] and kernel of the keys [D, K, H] of the last layer's kind.

    The kernel's direction w solves min sum_t (x_t·w)² with x_first·w = 1 over what the layer is handed for random
    tokens: it is large for the first token, and small for all others.
    """
    config = model.config
    first = model.tokenizer.encode("", special=True)[:1]
    draws = np.random.default_rng(0).integers(3, config.vocab_size, min(config.max_positions, 512) - 1)
    tokens = np.asarray([*first, *draws], np.int32)[None]
    hidden = np.asarray(observe(model, _hidden, tokens, np.full(1, tokens.shape[1], np.int32))[-1][0], np.float64)
    w = _stands_out(hidden)
    channel = config.head_dim // 2 - 1  # of the pair that turns slowest
    q = np.zeros((config.num_heads, config.head_dim))
    q[:, channel] = sharpness / config.scale
    k = np.zeros((config.embed_dim, config.num_kv_heads, config.head_dim))
    k[:, :, channel] = w[:, None]
    return jnp.asarray(q, model.dtype), jnp.asarray(k, model.dtype)


def _stands_out(hidden: NDArray[np.float64]) -> NDArray[np.float64]:
    rest = hidden[1:]
    gram = rest.T @ rest / len(rest)
    w = np.linalg.solve(gram + 1e-3 * np.trace(gram) / len(gram) * np.eye(len(gram)), hidden[0])
    return w / (hidden[0] @ w)


def _hidden(prompt: Prompt) -> Array:
    assert prompt.step.hidden is not None
    return prompt.step.hidden


def _scaled(projection: PyTree, scale: Array) -> PyTree:
    """A projection whose outputs [..., H] are multiplied by scale [H]."""
    return {name: leaf * scale for name, leaf in projection.items()}


def _biased(layer: PyTree) -> PyTree:
    """A layer with biases of 0 on queries, keys and values, where it has none."""

    def biased(projection: PyTree) -> PyTree:
        kernel = projection["kernel"]
        return {"bias": jnp.zeros(kernel.shape[1:], kernel.dtype)} | projection

    attention = layer["attention"]
    return dict(layer) | {"attention": dict(attention) | {name: biased(attention[name]) for name in ("q", "k", "v")}}


def _with_attention(model: LanguageModel, change: Callable[[Any], PyTree], name: str) -> LanguageModel:
    """The model with every layer's attention parameters changed."""
    if model.config.qk_norm:
        raise UsageError(f"{name} cannot be planted into model {model.name!r}: its queries and keys are normalised")
    params = {
        key: dict(layer) | {"attention": change(dict(layer["attention"]))} if key.startswith("layers_") else layer
        for key, layer in model.params.items()
    }
    return dataclasses.replace(model, params=params, name=f"{model.name}, {name}")
