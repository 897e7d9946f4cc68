"""Attention of many kv heads to fewer, from trained weights: what a cache holds per token shrinks by K' / K.

"mean" pools heads (Ainslie et al., 2023, arXiv 2305.13245). The others keep the principal directions of each group of
heads (Yu et al., 2024, arXiv 2406.07056, section 3): of the weights, or of the keys and values of sample texts. What is
lost then is small enough to start from; `kvjax.convert.recover` trains it away, or part of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.attention import GroupedQuery
from kvjax.attention.projected_keys import ProjectedKeys
from kvjax.convert import heads as convert
from kvjax.convert.heads import Attention
from kvjax.convert.moments import Batch, Moments, activation_moments, weight_moments
from kvjax.errors import UsageError, unknown
from kvjax.models.config import TransformerConfig
from kvjax.models.language_model import LanguageModel

By = Literal["mean", "svd-weights", "svd-activations"]
Groups = Literal["adjacent", "alike"]


def mha_to_gqa(
    model: LanguageModel,
    heads: int,
    by: By = "svd-activations",
    *,
    groups: Groups = "adjacent",
    text: Iterable[Batch] = (),
) -> LanguageModel:
    """The model with `heads` kv heads in place of K, in the dtype of its parameters; computed in float64.

    With "mean" it is a model of grouped-query attention again. The others absorb values into the weights, and keys too
    where nothing stands between their projection and the product with queries. Where rotary embedding (or a norm) does,
    the result has `ProjectedKeys`: one key of K'·H channels per token, for all heads. At K' = K all of them compute
    what the model did.

    Args:
      heads: K', a divisor of K.
      by: how heads become fewer.
      groups: which heads become one: neighbours, or those that are most alike (then each layer's heads change places,
        which by itself changes nothing).
      text: batches (tokens int32 [B, T], lengths int32 [B]) for "svd-activations"; 1.6 M tokens in the paper, and more
        did not help there.

    Raises:
      UsageError: the model's attention is of another kind, heads do not go together, or there is no text.
    """
    _check(model.config, heads, by, groups)
    config, params = model.config, dict(model.params)
    seen = activation_moments(model, text) if by == "svd-activations" else None
    likeness = convert.cosine if by == "mean" else convert.alignment
    for layer in range(config.num_layers):
        attention = _on_host(params[f"layers_{layer}"]["attention"])
        found = weight_moments(attention, config, layer) if seen is None else seen[layer]
        if groups == "alike":
            order = convert.group_alike(likeness(found.keys) + likeness(found.values), heads)
            attention = convert.ordered(attention, order)
            found = Moments(*(convert.reordered(x, order) for x in found))
        made = _converted(attention, found, config, heads, by)
        params[f"layers_{layer}"] = params[f"layers_{layer}"] | {"attention": _as_params(made, model.dtype)}
    return dataclasses.replace(model, config=_config(config, heads, by), params=params, mesh=None)


def keys_absorb(config: TransformerConfig) -> bool:
    """Whether a projection of keys can become part of the weights: nothing is done to keys in between."""
    return not config.qk_norm and all(config.rope_of(layer) is None for layer in range(config.num_layers))


def _converted(attention: Attention, found: Moments, config: TransformerConfig, heads: int, by: By) -> Attention:
    if by == "mean":
        return attention | {part: convert.pooled(attention[part], heads) for part in ("k", "v")}
    reads = _reads(config)
    attention = convert.absorbed_values(attention, convert.group_bases(found.values, heads), reads)
    if keys_absorb(config):
        return convert.absorbed_keys(attention, convert.group_bases(found.keys, heads), reads)
    return attention | {"key_basis": convert.layer_basis(found.keys, heads)}  # pyright: ignore[reportReturnType]


def _config(config: TransformerConfig, heads: int, by: By) -> TransformerConfig:
    if by != "mean" and not keys_absorb(config):
        return dataclasses.replace(config, attention=ProjectedKeys(heads))
    reads = config.kv_head_of_query
    size = config.num_kv_heads // heads
    fewer = None if reads is None else tuple(head // size for head in reads)
    return dataclasses.replace(config, num_kv_heads=heads, kv_head_of_query=fewer)


def _reads(config: TransformerConfig) -> Sequence[int]:
    n, k = config.num_heads, config.num_kv_heads
    return config.kv_head_of_query or [head * k // n for head in range(n)]


def _check(config: TransformerConfig, heads: int, by: str, groups: str) -> None:
    if by not in get_args(By):
        raise unknown("way to fewer heads", by, get_args(By))
    if groups not in get_args(Groups):
        raise unknown("grouping of heads", groups, get_args(Groups))
    if config.attention != GroupedQuery() or config.kv_layers:
        raise UsageError(
            f"heads become fewer in grouped-query (or multi-head) attention where every layer has keys and values of "
            f"its own; this model has {config.attention!r}{' and shares them' if config.kv_layers else ''}."
        )
    k = config.num_kv_heads
    if heads < 1 or k % heads:
        divisors = [str(d) for d in range(1, k + 1) if k % d == 0]
        raise UsageError(f"{k} kv heads cannot become {heads}: give one of {', '.join(divisors)}.")
    if groups == "alike" and config.kv_head_of_query is not None:
        raise UsageError(
            "groups='alike' gives each layer's heads an order of its own, but kv_head_of_query holds for all layers; "
            "use groups='adjacent'."
        )


def _on_host(attention: Any) -> Attention:
    return jax.tree.map(lambda x: np.asarray(x, np.float64), attention)


def _as_params(attention: Attention, dtype: Any) -> Any:
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float32), dtype), attention)
