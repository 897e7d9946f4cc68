"""Latent attention in Hugging Face folders: DeepSeek-V2 and -V3 checkpoints whose layers are all dense.

They keep the projections to the latent and to the rotary key in one tensor, the maps of latents to keys and to values
in another, and channels of rotary embedding in pairs beside each other, (0, 1), (2, 3), ..., where kvjax pairs channel
i with i + C/2. Both ways rows change places, and nothing is computed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from kvjax.attention import MultiHeadLatent
from kvjax.attention.rope import Yarn
from kvjax.errors import UsageError
from kvjax.models.config import TransformerConfig

Json = Mapping[str, Any]

NORM_EPS = 1e-6
"""Of the norms of latents, in these architectures a constant."""

SIZES: Mapping[str, Any] = {
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "first_k_dense_replace": 0,
}
# What only mixtures of experts and multi-token prediction have, and sizes that follow from others.
IGNORED = frozenset(
    """
    head_dim qk_head_dim moe_intermediate_size n_shared_experts n_routed_experts num_experts num_local_experts
    num_experts_per_tok routed_scaling_factor n_group topk_group topk_method norm_topk_prob scoring_func seq_aux
    aux_loss_alpha ep_size moe_layer_freq num_nextn_predict_layers num_mtp_layers output_router_logits
    """.split()
)


def read_attention(fields: Json) -> dict[str, Any]:
    """Fields of `TransformerConfig` from those of config.json.

    Raises:
      UsageError: layers with experts, or what kvjax's latent attention does not compute.
    """
    dense, layers = fields["first_k_dense_replace"], fields["num_hidden_layers"]
    if dense < layers:
        raise UsageError(
            f"config.json: layers from {dense} on are mixtures of experts (first_k_dense_replace {dense} of {layers} "
            "layers), which are not implemented; only models whose layers are all dense are."
        )
    if not fields.get("rope_interleave", True):
        raise UsageError("config.json: rope_interleave false is not implemented; pairs of channels lie side by side.")
    if fields["attention_bias"] and fields["q_lora_rank"] is None:
        raise UsageError("config.json: attention_bias without q_lora_rank (queries without a bias) is not implemented.")
    kind = MultiHeadLatent(
        latent_dim=fields["kv_lora_rank"],
        rotary_key_dim=fields["qk_rope_head_dim"],
        query_dim=fields["q_lora_rank"],
        value_dim=fields["v_head_dim"],
        scale_factor=_scale_factor(fields["rope_parameters"] or fields["rope_scaling"] or {}),
        norm_eps=NORM_EPS,
    )
    return {"attention": kind, "head_dim": fields["qk_nope_head_dim"]}


def write_attention(config: TransformerConfig, fields: Json) -> dict[str, Any]:
    """The fields of config.json that `read_attention` reads; `fields` are the others.

    Of attention that no such fields describe, those that come nearest: what is written is read back and compared.
    """
    dense = {"first_k_dense_replace": config.num_layers, "num_nextn_predict_layers": 0}
    kind = config.attention
    if not isinstance(kind, MultiHeadLatent):
        return dense
    written = dense | {
        "q_lora_rank": kind.query_dim,
        "kv_lora_rank": kind.latent_dim,
        "qk_rope_head_dim": kind.rotary_key_dim,
        "qk_nope_head_dim": config.head_dim,
        "v_head_dim": kind.value_dim or config.head_dim,
    }
    scaling = None if config.rope is None else config.rope.scaling
    if kind.scale_factor != 1.0 and isinstance(scaling, Yarn) and scaling.factor > 1:
        mscale = {"mscale_all_dim": _mscale(kind.scale_factor, scaling.factor)}
        written |= {name: {**fields[name], **mscale} for name in ("rope_parameters", "rope_scaling")}
    return written


def _scale_factor(rope: Json) -> float:
    """mscale ** 2 of YaRN; to nine digits, so that what is written reads back the same."""
    mscale = rope.get("mscale_all_dim")
    if not mscale or not rope.get("factor"):
        return 1.0
    return float(f"{Yarn.default_amplitude(rope['factor'], mscale) ** 2:.9g}")


def _mscale(scale_factor: float, factor: float) -> float:
    """The shortest number that `_scale_factor` makes this of."""
    exact = (math.sqrt(scale_factor) - 1) / (0.1 * math.log(factor))
    shorter = (round(exact, digits) for digits in range(16))
    return next(
        (x for x in shorter if _scale_factor({"factor": factor, "mscale_all_dim": x}) == scale_factor),
        exact,
    )


@dataclasses.dataclass(frozen=True)
class Rows:
    """Where a parameter of attention is stored: the tensor's name below `self_attn`, its number of rows (outputs), and
    for each output of the parameter its row; None means all in order."""

    name: str
    total: int = 0
    rows: tuple[int, ...] | None = None


def layout(config: TransformerConfig) -> Mapping[tuple[str, ...], Rows]:
    """For each parameter of a layer's attention, by its path there, where it is stored; {} for other kinds."""
    kind = config.attention
    if not isinstance(kind, MultiHeadLatent):
        return {}
    heads, own, turned = config.num_heads, config.head_dim, kind.rotary_key_dim
    value, rank = kind.value_dim or own, kind.latent_dim
    pairs = np.arange(turned).reshape(-1, 2).T.ravel()  # kvjax's channel -> the checkpoint's
    first = np.arange(heads)[:, None]
    queries = (first * (own + turned) + np.concatenate([np.arange(own), own + pairs])).ravel()
    each = first * (own + value)
    keys, values = (each + np.arange(own)).ravel(), (each + own + np.arange(value)).ravel()
    down, up, q = "kv_a_proj_with_mqa", "kv_b_proj.weight", "q_proj" if kind.query_dim is None else "q_b_proj"
    found = {
        ("up_keys",): Rows(up, heads * (own + value), _tuple(keys)),
        ("up_values",): Rows(up, heads * (own + value), _tuple(values)),
        ("q", "kernel"): Rows(f"{q}.weight", heads * (own + turned), _tuple(queries)),
        ("latent_norm", "scale"): Rows("kv_a_layernorm.weight"),
        ("q_latent_norm", "scale"): Rows("q_a_layernorm.weight"),
    }
    for ours, theirs in (("kernel", "weight"), ("bias", "bias")):
        found |= {
            ("latent", ours): Rows(f"{down}.{theirs}", rank + turned, _tuple(np.arange(rank))),
            ("rotary_key", ours): Rows(f"{down}.{theirs}", rank + turned, _tuple(rank + pairs)),
            ("q_latent", ours): Rows(f"q_a_proj.{theirs}"),
        }
    return found


def _tuple(rows: np.ndarray[Any, np.dtype[np.signedinteger[Any]]]) -> tuple[int, ...]:
    return tuple(int(row) for row in rows)
