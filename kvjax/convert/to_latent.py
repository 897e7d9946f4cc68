"""Grouped-query attention of a trained model to multi-head latent attention, without training.

Published conversions of this kind: TransMLA (Meng et al., 2025, arXiv 2502.07864) and MHA2MLA (Ji et al., 2025, arXiv
2502.14837); `latent_factors` says what is done here, and why rotary embedding is what stands in the way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.attention import GroupedQuery, MultiHeadLatent
from kvjax.attention.rope import Repeated, RopeConfig
from kvjax.cache.prompt import attend_prompt
from kvjax.cache.step import Step
from kvjax.convert import latent_factors as factors
from kvjax.convert.heads import Attention, Floats
from kvjax.convert.moments import Batch
from kvjax.errors import UsageError
from kvjax.models.config import TransformerConfig
from kvjax.models.language_model import LanguageModel
from kvjax.models.transformer import Transformer
from kvjax.typing import Array, PyTree

REACH = 8
"""Of distances near what attention reads most; 32 to 256 do worse on the model that comes with kvjax."""


def to_latent(
    model: LanguageModel,
    latent_dim: int,
    *,
    rotary_heads: int = 1,
    reach: int = REACH,
    text: Iterable[Batch] = (),
) -> LanguageModel:
    """The model with `MultiHeadLatent` attention, in the dtype of its parameters; computed in float64.

    A cache then holds latent_dim + rotary_heads · H numbers per token and layer where it held 2 · K · H. Two things are
    approximated:

    1. Of the keys, `rotary_heads` mixes of heads per frequency stay rotary, those with the most power. The others lose
       their rotation for its mean over near distances. With rotary_heads = K none does, and nothing is lost here.
    2. Values and what is left of the keys become one latent by their joint principal directions. Nothing is lost here
       from latent_dim = (2 K - rotary_heads) · H on, or where fewer directions hold all of it.

    So rotary_heads=K and latent_dim=K·H is the same function, in as many bytes; rotary_heads=1 has an error that
    depends on the model at any latent_dim, unless it has no rotary embedding. `kvjax.convert.recover` trains part of it
    away. The latent has no norm. Projections of queries grow from H to (1 + rotary_heads) · H channels per head.

    Args:
      latent_dim: R, channels of the latent, at most (2 K - rotary_heads) · H.
      rotary_heads: channels of the shared rotary key, in heads.
      reach: distances in tokens over which the rotation of the rest of the keys is averaged.
      text: batches (tokens int32 [B, T], lengths int32 [B]) whose inputs of each layer weigh what is lost. Without any,
        channels of inputs are taken as uncorrelated, and as large as the norm before attention makes them.

    Raises:
      UsageError: attention of another kind, keys with a norm, or a size that does not exist.
    """
    config = model.config
    _check(config, latent_dim, rotary_heads, reach)
    seen, params = input_moments(model, text), dict(model.params)
    for layer in range(config.num_layers):
        name = f"layers_{layer}"
        own = jax.tree.map(lambda x: np.asarray(x, np.float64), params[name]["attention"])
        moments = _of_norm(params[name], config) if seen is None else seen[layer]
        made = _converted(own, moments, config, layer, latent_dim, rotary_heads, reach)
        made = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float32), model.dtype), made)
        params[name] = params[name] | {"attention": made}
    return dataclasses.replace(model, config=_config(config, latent_dim, rotary_heads), params=params, mesh=None)


def _check(config: TransformerConfig, latent_dim: int, rotary_heads: int, reach: int) -> None:
    if config.attention != GroupedQuery() or config.kv_layers:
        raise UsageError(
            f"only grouped-query attention whose layers have keys and values of their own becomes latent; this model "
            f"has {config.attention!r}{' and shares them' if config.kv_layers else ''}."
        )
    if config.qk_norm:
        raise UsageError(
            "this model has a norm between keys and their product with queries (qk_norm), so keys are no linear map "
            "of a latent. Use fewer kv heads instead: kvjax.convert.mha_to_gqa."
        )
    heads, width = config.num_kv_heads, config.head_dim
    if not 1 <= rotary_heads <= heads:
        raise UsageError(f"rotary_heads is 1 to {heads}, the model's kv heads; got {rotary_heads}.")
    most = (2 * heads - rotary_heads) * width
    if not 1 <= latent_dim <= most:
        raise UsageError(
            f"latent_dim is 1 to {most} with rotary_heads={rotary_heads}: keys and values have no more directions; "
            f"got {latent_dim}."
        )
    if reach < 1:
        raise UsageError(f"reach is at least 1 token; got {reach}.")


def _config(config: TransformerConfig, latent_dim: int, rotary_heads: int) -> TransformerConfig:
    width = rotary_heads * config.head_dim
    factor = config.scale * (config.head_dim + width) ** 0.5
    return dataclasses.replace(
        config,
        attention=MultiHeadLatent(latent_dim, width, scale_factor=factor, normed=False),
        num_kv_heads=config.num_heads,
        kv_head_of_query=None,
        attention_scale=None,
        rope=_repeated(config.rope, rotary_heads),
        local_rope=_repeated(config.local_rope, rotary_heads),
    )


def _repeated(rope: RopeConfig | None, times: int) -> RopeConfig | None:
    if rope is None or times == 1:
        return rope
    return RopeConfig(rope.theta, Repeated(rope.scaling, times))


def _converted(
    own: Attention,
    moments: Floats,
    config: TransformerConfig,
    layer: int,
    latent_dim: int,
    rotary_heads: int,
    reach: int,
) -> dict[str, Any]:
    """The parameters of `MultiHeadLatentAttention`, float64; those that project the layer's input with their bias."""
    n, k = config.num_heads, config.num_kv_heads
    reads = list(config.kv_head_of_query or (head * k // n for head in range(n)))
    queries, keys, values = (_with_bias(own[name]) for name in ("q", "k", "v"))
    mixed = factors.mixes(keys, moments, rotary_heads)
    left = factors.rest(keys, mixed, _turn(config, layer).mean(reach))
    latent, up_keys, up_values = factors.joint_factors(left, values, moments, latent_dim)
    wide = np.concatenate([queries, factors.rotary_queries(queries, mixed, reads)], axis=-1)
    biased = "bias" in own["k"]
    return {
        "latent": _split(latent, biased),
        "rotary_key": _split(factors.rotary_keys(keys, mixed), biased),
        "q": _split(wide, biased),
        "up_keys": up_keys[reads],
        "up_values": up_values[reads],
        "o": own["o"],
    }


def _turn(config: TransformerConfig, layer: int) -> factors.Turn:
    rope = config.rope_of(layer)
    if rope is None:
        return factors.Turn(np.zeros(config.head_dim // 2), 1.0)
    table = rope.table(config.head_dim, jnp.int32(config.max_positions))
    return factors.Turn(np.asarray(table.inv_freq, np.float64), float(table.amplitude))


def _with_bias(projection: dict[str, Floats]) -> Floats:
    """The kernel [D, heads, H], with the bias as one more row: the weights of an input that is always 1."""
    kernel = projection["kernel"]
    return np.concatenate([kernel, projection["bias"][None]]) if "bias" in projection else kernel


def _split(weights: Floats, biased: bool) -> dict[str, Floats]:
    return {"kernel": weights[:-1], "bias": weights[-1]} if biased else {"kernel": weights}


def _of_norm(layer: Any, config: TransformerConfig) -> Floats:
    """The second moments of normalised inputs [D', D'] whose channels know nothing of each other."""
    scale = np.asarray(layer["attention_norm"]["scale"], np.float64) + config.norm_offset
    return np.diag(np.concatenate([scale**2, np.ones(int(config.qkv_bias))]))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Summing:
    """A layer's cache that keeps nothing but the second moments of the layer's input, and of 1 where it has biases."""

    length: Array
    biased: bool = dataclasses.field(default=False, metadata={"static": True})

    def step(self, step: Step) -> tuple[Array, Array]:
        assert step.hidden is not None
        x = step.hidden.astype(jnp.float32)
        if self.biased:
            x = jnp.concatenate([x, jnp.ones((*x.shape[:2], 1))], axis=-1)
        x = jnp.where(step.valid[..., None], x, 0)
        return attend_prompt(step)[0], jnp.einsum("btd,bte->de", x, x, precision="highest")


def input_moments(model: LanguageModel, batches: Iterable[Batch]) -> list[Floats] | None:
    """Per layer the sum of x xᵀ of its input x, [D, D] (with biases of [x; 1]), float64; None without any text."""
    total: list[Floats] | None = None
    for tokens, lengths in batches:
        found = _moments(model.module, model.params, jnp.asarray(tokens), jnp.asarray(lengths))
        arrays = [np.asarray(x, np.float64) for x in found]
        total = arrays if total is None else [a + b for a, b in zip(total, arrays, strict=True)]
    return total


@partial(jax.jit, static_argnames=("module",))
def _moments(module: Transformer, params: PyTree, tokens: Array, lengths: Array) -> tuple[Array, ...]:
    empty = tuple(_Summing(jnp.zeros_like(lengths), module.config.qkv_bias) for _ in module.config.owners)
    valid = jnp.arange(tokens.shape[1]) < lengths[:, None]
    _, found = module.apply({"params": params}, tokens, cache=empty, valid=valid, logits_at=lengths - 1)
    return found  # pyright: ignore[reportReturnType]
