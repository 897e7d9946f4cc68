"""Decoders of Hugging Face checkpoints in slow NumPy, from their tensors by name and their config.json.

Written from the model descriptions (Llama: arXiv 2302.13971 and 2307.09288; Gemma 3: arXiv 2503.19786), one row, one
query token and one head at a time, in float64, for the fields that the two tiny checkpoints below use.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from tests.oracles.attention import attend_one
from tests.oracles.rotary import rotate_each

Tensors = Mapping[str, np.ndarray]
Json = Mapping[str, Any]

LLAMA: Json = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-3,
    "rope_theta": 500.0,
    "rope_scaling": None,
    "attention_bias": True,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
GEMMA: Json = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-3,
    "query_pre_attn_scalar": 5,
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "rope_theta": 3000.0,
    "rope_local_base_freq": 50.0,
    "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    "final_logit_softcapping": 6.0,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}


def random_checkpoint(json: Json, seed: int = 0) -> dict[str, np.ndarray]:
    """float32 tensors of a checkpoint by name, large enough that every part shows in the logits."""
    rng = np.random.default_rng(seed)
    embed, mlp, head = json["hidden_size"], json["intermediate_size"], json["head_dim"]
    queries, keys = json["num_attention_heads"] * head, json["num_key_value_heads"] * head
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (json["vocab_size"], embed),
        "model.norm.weight": (embed,),
    }
    if not json["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (json["vocab_size"], embed)
    norms = ["input_layernorm", "post_attention_layernorm"]
    if json["model_type"] == "gemma3_text":
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    for layer in range(json["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.{norm}.weight": (embed,) for norm in norms}
        widths = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
        shapes |= {f"{at}.self_attn.{name}.weight": (width, embed) for name, width in widths.items()}
        shapes[f"{at}.self_attn.o_proj.weight"] = (embed, queries)
        if json.get("attention_bias"):
            biases = widths | {"o_proj": embed}
            shapes |= {f"{at}.self_attn.{name}.bias": (width,) for name, width in biases.items()}
        if json["model_type"] == "gemma3_text":
            shapes |= {f"{at}.self_attn.{name}.weight": (head,) for name in ("q_norm", "k_norm")}
        shapes |= {f"{at}.mlp.{name}.weight": (mlp, embed) for name in ("gate_proj", "up_proj")}
        shapes[f"{at}.mlp.down_proj.weight"] = (embed, mlp)
    return {name: _draw(rng, name, shape) for name, shape in shapes.items()}


def _draw(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    noise = rng.standard_normal(shape)
    if len(shape) == 2:
        noise = noise if "embed" in name else noise / math.sqrt(shape[1])
    else:
        noise = 0.3 * noise + (1.0 if "norm" in name else 0.0)
    return noise.astype(np.float32)


def _rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * weight


def _linear(tensors: Tensors, name: str, x: np.ndarray) -> np.ndarray:
    y = x @ tensors[f"{name}.weight"].astype(np.float64).T
    return y + tensors[f"{name}.bias"] if f"{name}.bias" in tensors else y


def _heads(x: np.ndarray, head_dim: int) -> np.ndarray:
    return x.reshape(len(x), -1, head_dim)


def _causal(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float, window: int | None) -> np.ndarray:
    """q [T, N, H], k and v [T, K, H]: one query of one head at a time. `attend_one` divides by sqrt(H) itself."""
    out = np.zeros_like(q)
    per_kv_head = q.shape[1] // k.shape[1]
    for position in range(len(q)):
        first = 0 if window is None else max(0, position - window + 1)
        for head in range(q.shape[1]):
            keys, values = (x[first : position + 1, head // per_kv_head] for x in (k, v))
            query = q[position, head] * scale * math.sqrt(q.shape[-1])
            out[position, head], _ = attend_one(query, keys, values)
    return out.reshape(len(q), -1)


def llama_logits(json: Json, tensors: Tensors, tokens: np.ndarray) -> np.ndarray:
    """tokens [T] to logits [T, V]: pre-norm, rotary embedding, grouped queries, SwiGLU, a head of its own."""
    eps, head = json["rms_norm_eps"], json["head_dim"]
    positions = np.arange(len(tokens))
    x = tensors["model.embed_tokens.weight"][tokens].astype(np.float64)
    for layer in range(json["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        y = _rms_norm(x, tensors[f"{at}.input_layernorm.weight"], eps)
        q, k, v = (_heads(_linear(tensors, f"{at}.self_attn.{name}_proj", y), head) for name in "qkv")
        q, k = (rotate_each(part, positions, json["rope_theta"]) for part in (q, k))
        x = x + _linear(tensors, f"{at}.self_attn.o_proj", _causal(q, k, v, 1 / math.sqrt(head), None))
        y = _rms_norm(x, tensors[f"{at}.post_attention_layernorm.weight"], eps)
        gate = _linear(tensors, f"{at}.mlp.gate_proj", y)
        y = gate / (1 + np.exp(-gate)) * _linear(tensors, f"{at}.mlp.up_proj", y)
        x = x + _linear(tensors, f"{at}.mlp.down_proj", y)
    return _linear(tensors, "lm_head", _rms_norm(x, tensors["model.norm.weight"], eps))


def gemma_logits(json: Json, tensors: Tensors, tokens: np.ndarray) -> np.ndarray:
    """tokens [T] to logits [T, V]: four norms per layer, scaled by 1 + weight; q/k norm; local and global layers."""
    eps, head = json["rms_norm_eps"], json["head_dim"]
    positions = np.arange(len(tokens))

    def norm(name: str, y: np.ndarray) -> np.ndarray:
        return _rms_norm(y, 1.0 + tensors[f"{name}.weight"].astype(np.float64), eps)

    x = tensors["model.embed_tokens.weight"][tokens].astype(np.float64) * math.sqrt(json["hidden_size"])
    for layer, kind in enumerate(json["layer_types"]):
        at = f"model.layers.{layer}"
        y = norm(f"{at}.input_layernorm", x)
        q, k, v = (_heads(_linear(tensors, f"{at}.self_attn.{name}_proj", y), head) for name in "qkv")
        q, k = norm(f"{at}.self_attn.q_norm", q), norm(f"{at}.self_attn.k_norm", k)
        if kind == "sliding_attention":
            window, angles, theta = json["sliding_window"], positions, json["rope_local_base_freq"]
        else:
            window, angles, theta = None, positions / json["rope_scaling"]["factor"], json["rope_theta"]
        q, k = (rotate_each(part, angles, theta) for part in (q, k))
        y = _causal(q, k, v, json["query_pre_attn_scalar"] ** -0.5, window)
        x = x + norm(f"{at}.post_attention_layernorm", _linear(tensors, f"{at}.self_attn.o_proj", y))
        y = norm(f"{at}.pre_feedforward_layernorm", x)
        gate = _linear(tensors, f"{at}.mlp.gate_proj", y)
        gate = 0.5 * gate * (1 + np.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
        y = _linear(tensors, f"{at}.mlp.down_proj", gate * _linear(tensors, f"{at}.mlp.up_proj", y))
        x = x + norm(f"{at}.post_feedforward_layernorm", y)
    logits = norm("model.norm", x) @ tensors["model.embed_tokens.weight"].astype(np.float64).T
    cap = json["final_logit_softcapping"]
    return cap * np.tanh(logits / cap)
