"""Which fields of config.json each family has, what transformers assumes where one is missing, and what they fix.

Every field of a config.json is one of three things, and anything else is refused by name:
  honoured: a key of `Family.honoured`; its value there is what transformers assumes where the field is missing;
  harmless: in `HARMLESS` (or `Family.harmless`): it does not change the logits;
  neutral: in `NEUTRAL`: accepted only at the values listed there, where it changes nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from kvjax.models.huggingface import latent

Json = Mapping[str, Any]

# Field of config.json -> field of TransformerConfig, where the value is the same.
SAME: Mapping[str, str] = MappingProxyType(
    {
        "vocab_size": "vocab_size",
        "hidden_size": "embed_dim",
        "intermediate_size": "mlp_dim",
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "num_key_value_heads": "num_kv_heads",
        "head_dim": "head_dim",
        "max_position_embeddings": "max_positions",
        "rms_norm_eps": "norm_eps",
        "tie_word_embeddings": "tied_embeddings",
        "mlp_bias": "mlp_bias",
        "attn_logit_softcapping": "attention_softcap",
        "final_logit_softcapping": "logit_softcap",
    }
)

ACTIVATIONS: Mapping[str, str] = MappingProxyType(
    {
        "silu": "silu",
        "swish": "silu",
        "gelu": "gelu",
        "gelu_pytorch_tanh": "gelu_tanh",
        "gelu_new": "gelu_tanh",
        "relu": "relu",
    }
)

HARMLESS = frozenset(
    """
    model_type architectures transformers_version torch_dtype dtype _name_or_path name_or_path _commit_hash
    bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id decoder_start_token_id
    use_cache cache_implementation initializer_range attention_dropout hidden_dropout resid_pdrop embd_pdrop
    pretraining_tp output_attentions output_hidden_states return_dict torchscript problem_type id2label label2id
    num_labels finetuning_task task_specific_params chunk_size_feed_forward tokenizer_class prefix
    _attn_implementation attn_implementation _attn_implementation_autoset _experts_implementation gradient_checkpointing
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p
    typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id
    remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
    is_decoder unsloth_version unsloth_fixed neftune_noise_alpha
    """.split()
)

# Sliding window, soft caps and biases stand here for the families that lack them: at these values they change nothing.
NEUTRAL: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "qkv_bias": (False,),
        "use_sliding_window": (False,),
        "use_bidirectional_attention": (False,),
        "partial_rotary_factor": (1, 1.0),
        "rope_interleaved": (False,),
        "use_mrope": (False,),
        "is_encoder_decoder": (False,),
        "add_cross_attention": (False,),
        "tie_encoder_decoder": (False,),
        "use_qk_norm": (False,),
        "pruned_heads": ({},),
        "use_bfloat16": (False,),
    }
)


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture of Hugging Face transformers.

    Attributes:
      model_type: of config.json.
      architecture: the class that computes logits.
      honoured: field -> what transformers assumes where it is missing.
      implied: values of `TransformerConfig` that the architecture fixes.
      slides: (layer, fields) -> whether the layer has the sliding window, where `layer_types` does not say.
      activation_field: where the activation is named.
      scales_embeddings: embeddings are multiplied by sqrt(hidden_size).
      local_rope: windowed layers have rotary parameters of their own.
      default_theta, default_local_theta: rope_theta where it is missing.
      harmless: fields that this architecture ignores.
      read_attention: fields of `TransformerConfig` that follow from others than those of `SAME`.
      write_attention: the fields behind those, given the config and the other fields written.
    """

    model_type: str
    architecture: str
    honoured: Mapping[str, Any]
    implied: Mapping[str, Any]
    slides: Callable[[int, Json], bool]
    activation_field: str = "hidden_act"
    scales_embeddings: bool = False
    local_rope: bool = False
    default_theta: float = 10_000.0
    default_local_theta: float = 10_000.0
    harmless: frozenset[str] = frozenset()
    read_attention: Callable[[Json], dict[str, Any]] = lambda fields: {}
    write_attention: Callable[[Any, Json], dict[str, Any]] = lambda config, fields: {}


_ROPE = {"rope_theta": None, "rope_scaling": None, "rope_parameters": None}
_LLAMA_SIZES = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
_MISTRAL_SIZES = _LLAMA_SIZES | {
    "intermediate_size": 14_336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
}
_QWEN_SIZES = _LLAMA_SIZES | {
    "vocab_size": 151_936,
    "intermediate_size": 22_016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32_768,
}
_GEMMA2_SIZES = {
    "vocab_size": 256_000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
}
_LATENT_SIZES = {
    **{name: size for name, size in _LLAMA_SIZES.items() if name != "head_dim"},
    **_ROPE,
    **latent.SIZES,
    "attention_bias": False,
}
_QWEN_WINDOW = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "layer_types": None}


def _qwen_slides(layer: int, fields: Json) -> bool:
    return bool(fields["use_sliding_window"]) and layer >= fields["max_window_layers"]


_FAMILIES = (
    Family(
        model_type="llama",
        architecture="LlamaForCausalLM",
        honoured=_LLAMA_SIZES | _ROPE | {"attention_bias": False, "mlp_bias": False},
        implied={},
        slides=lambda layer, fields: False,
    ),
    Family(
        model_type="mistral",
        architecture="MistralForCausalLM",
        honoured=_MISTRAL_SIZES | _ROPE | {"sliding_window": 4096},
        implied={},
        slides=lambda layer, fields: fields["sliding_window"] is not None,
    ),
    Family(
        model_type="qwen2",
        architecture="Qwen2ForCausalLM",
        honoured=_QWEN_SIZES | _ROPE | _QWEN_WINDOW,
        implied={"qkv_bias": True},
        slides=_qwen_slides,
    ),
    Family(
        model_type="qwen3",
        architecture="Qwen3ForCausalLM",
        honoured=_QWEN_SIZES | _ROPE | _QWEN_WINDOW | {"head_dim": 128, "attention_bias": False},
        implied={"qk_norm": True},
        slides=_qwen_slides,
    ),
    Family(
        model_type="gemma2",
        architecture="Gemma2ForCausalLM",
        honoured=_GEMMA2_SIZES
        | _ROPE
        | {
            "attention_bias": False,
            "sliding_window": 4096,
            "layer_types": None,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        implied={"norm_offset": 1.0, "sandwich_norm": True},
        slides=lambda layer, fields: layer % 2 == 0,
        activation_field="hidden_activation",
        scales_embeddings=True,
        harmless=frozenset({"hidden_act"}),
    ),
    Family(
        model_type="gemma3_text",
        architecture="Gemma3ForCausalLM",
        # attn_logit_softcapping is absent on purpose: transformers carries the field but never applies it.
        honoured=_GEMMA2_SIZES
        | _ROPE
        | {
            "vocab_size": 262_208,
            "max_position_embeddings": 131_072,
            "attention_bias": False,
            "sliding_window": 4096,
            "sliding_window_pattern": 6,
            "layer_types": None,
            "final_logit_softcapping": None,
            "rope_local_base_freq": None,
        },
        implied={"norm_offset": 1.0, "sandwich_norm": True, "qk_norm": True},
        slides=lambda layer, fields: (layer + 1) % fields["sliding_window_pattern"] != 0,
        activation_field="hidden_activation",
        scales_embeddings=True,
        local_rope=True,
        default_theta=1_000_000.0,
        harmless=frozenset({"hidden_act", "_sliding_window_pattern"}),
    ),
    Family(
        model_type="deepseek_v3",
        architecture="DeepseekV3ForCausalLM",
        honoured=_LATENT_SIZES
        | {
            "vocab_size": 129_280,
            "hidden_size": 7168,
            "intermediate_size": 18_432,
            "num_hidden_layers": 61,
            "num_attention_heads": 128,
            "num_key_value_heads": 128,
            "max_position_embeddings": 4096,
            "first_k_dense_replace": 3,
            "rope_interleave": True,
        },
        implied={},
        slides=lambda layer, fields: False,
        harmless=latent.IGNORED,
        read_attention=latent.read_attention,
        write_attention=latent.write_attention,
    ),
    Family(
        model_type="deepseek_v2",
        architecture="DeepseekV2ForCausalLM",
        honoured=_LATENT_SIZES | {"vocab_size": 102_400, "mlp_bias": False},
        implied={},
        slides=lambda layer, fields: False,
        harmless=latent.IGNORED,
        read_attention=latent.read_attention,
        write_attention=latent.write_attention,
    ),
)

FAMILIES: Mapping[str, Family] = MappingProxyType({family.model_type: family for family in _FAMILIES})
