"""config.json in every spelling: the same model from each, and a refusal by name for what is not implemented."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from kvjax.attention.rope import Dynamic, Linear, Llama3, RopeConfig, Yarn
from kvjax.errors import UsageError
from kvjax.models.config import TransformerConfig
from kvjax.models.huggingface.config import read_config, write_config
from kvjax.models.huggingface.families import FAMILIES, HARMLESS, NEUTRAL
from tests.models.published import PUBLISHED


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_read(name: str) -> None:
    read_config(PUBLISHED[name])


def test_what_published_configs_mean() -> None:
    read = {name: read_config(json) for name, json in PUBLISHED.items()}
    llama = read["Llama-3.1-8B"]
    assert llama.rope == RopeConfig(500_000.0, Llama3(8.0, 1.0, 4.0, 8192)) and llama.head_dim == 128
    assert read["Llama-2-7b"] == TransformerConfig(
        vocab_size=32000,
        embed_dim=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=32,
        head_dim=128,
        mlp_dim=11008,
        max_positions=4096,
        norm_eps=1e-5,
    )
    assert read["Mistral-7B-v0.1"].windows == (4096,) * 32
    qwen = read["Qwen2.5-7B"]
    assert (qwen.qkv_bias, qwen.output_bias, qwen.windows) == (True, False, ())
    assert read["Qwen3-8B"].qk_norm and read["Qwen3-8B"].rope == RopeConfig(1e6)
    gemma2 = read["gemma-2-9b"]
    assert gemma2.windows == (4096, None) * 21 and gemma2.tied_embeddings and gemma2.embed_scale == 3584**0.5
    assert (gemma2.attention_softcap, gemma2.logit_softcap, gemma2.scale) == (50.0, 30.0, 1 / 16)
    gemma3 = read["gemma-3-4b-it"]
    assert gemma3.windows == ((1024,) * 5 + (None,)) * 5 + (1024,) * 4
    assert (gemma3.num_heads, gemma3.num_kv_heads, gemma3.head_dim, gemma3.vocab_size) == (8, 4, 256, 262_208)
    assert gemma3.rope_of(5) == RopeConfig(1e6, Linear(8.0)) and gemma3.rope_of(0) == RopeConfig(1e4)


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_is_written_reads_back_the_same(name: str) -> None:
    config = read_config(PUBLISHED[name])
    written = write_config(config, "bfloat16")
    again = read_config(written)
    assert dataclasses.replace(again, windows=config.windows, attention_scale=config.attention_scale) == config
    assert again.scale == config.scale
    assert [again.window_of(i) for i in range(again.num_layers)] == [
        config.window_of(i) for i in range(config.num_layers)
    ]
    inner = PUBLISHED[name].get("text_config", PUBLISHED[name])
    assert written["model_type"] == inner["model_type"] and written["torch_dtype"] == written["dtype"] == "bfloat16"
    # Either spelling alone says the same.
    old = {key: value for key, value in written.items() if key not in ("rope_parameters", "dtype")}
    new = {
        key: value
        for key, value in written.items()
        if key not in ("rope_theta", "rope_scaling", "rope_local_base_freq", "torch_dtype")
    }
    assert read_config(old) == read_config(new) == again


LLAMA = PUBLISHED["Llama-2-7b"]


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"type": "linear", "factor": 2.0}, Linear(2.0)),
        ({"rope_type": "linear", "type": "linear", "factor": 2.0}, Linear(2.0)),
        ({"rope_type": "dynamic", "factor": 3.0}, Dynamic(3.0, 4096)),
        ({"rope_type": "dynamic", "factor": 3.0, "original_max_position_embeddings": 4096}, Dynamic(3.0, 4096)),
        (
            {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
            Llama3(2.0, 1.0, 4.0, 4096),
        ),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}, Yarn(4.0, 1024)),
        ({"rope_type": "yarn", "original_max_position_embeddings": 1024}, Yarn(4.0, 1024)),
        ({"rope_type": "yarn", "factor": 4.0, "beta_fast": 16, "truncate": False}, Yarn(4.0, 4096, 16, truncate=False)),
        ({"rope_type": "yarn", "factor": 4.0, "attention_factor": 0.5}, Yarn(4.0, 4096, amplitude=0.5)),
        ({"rope_type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0}, Yarn(4.0, 4096, amplitude=1.0)),
    ],
)
def test_rope_in_both_spellings(rope: dict[str, Any], expected: Any) -> None:
    old = read_config(LLAMA | {"rope_theta": 7e5, "rope_scaling": rope})
    new = read_config({**LLAMA, "rope_parameters": rope | {"rope_theta": 7e5}})
    assert old.rope == new.rope == RopeConfig(7e5, expected)
    assert read_config(write_config(old, "float32")).rope == old.rope


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "mixtral"}, r"model_type 'mixtral' is not implemented. Did you mean 'mistral'"),
        ({"model_type": None}, "model_type '' is not implemented"),
        (
            {"architectures": ["LlamaForSequenceClassification"]},
            "'LlamaForSequenceClassification' .* only 'LlamaForCausalLM'",
        ),
        ({"quantization_config": {"bits": 4}}, "'quantization_config'"),
        ({"sliding_window": 512}, "'sliding_window' = 512"),
        ({"partial_rotary_factor": 0.5}, "'partial_rotary_factor' = 0.5"),
        ({"attn_logit_softcapping": 30.0}, "'attn_logit_softcapping'"),
        ({"num_local_experts": 8}, r"'num_local_experts' = 8 .* assume_harmless=\['num_local_experts'\]"),
        ({"hidden_act": "xielu"}, "hidden_act 'xielu' is not implemented"),
        ({"hidden_size": "4096"}, "'hidden_size' has the value '4096' of type str"),
        ({"tie_word_embeddings": 1}, "'tie_word_embeddings' has the value 1"),
        ({"num_hidden_layers": True}, "'num_hidden_layers' has the value True"),
        ({"rope_theta": "1e4"}, "'rope_theta' has the value '1e4'"),
        ({"rope_scaling": "linear"}, "'rope_scaling' has the value 'linear' of type str"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "rope_scaling: the key 'factor' has the value '2'"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rope_scaling: rope_type 'longrope'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling: .* needs the key 'factor'"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta_fast": 3}}, "'linear' has no beta_fast"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}}, "partial_rotary_factor 0.25"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "per layer type are not implemented"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2, "original_max_position_embeddings": 9}}, "set both to one"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {"rope_type": "default"}},
            "rope_scaling and rope_parameters disagree",
        ),
    ],
)
def test_what_would_change_the_logits_is_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_config(LLAMA | fields)


def test_more_refusals() -> None:
    gemma3 = PUBLISHED["gemma-3-4b-it"]["text_config"]
    for fields, message in [
        ({"attn_logit_softcapping": 50.0}, "'attn_logit_softcapping'"),
        ({"use_bidirectional_attention": True}, "'use_bidirectional_attention'"),
        ({"layer_types": ["full_attention"]}, "1 entries for 34 layers"),
        ({"layer_types": ["chunked_attention"] * 34}, "chunked_attention"),
        ({"sliding_window": None}, "sliding_window is null"),
        ({"rope_parameters": {"rope_type": "default"}}, "must hold the keys 'full_attention'"),
    ]:
        with pytest.raises(UsageError, match=message):
            read_config(gemma3 | fields)
    qwen = PUBLISHED["Qwen2.5-7B"]
    with pytest.raises(UsageError, match="switched off"):
        read_config(qwen | {"layer_types": ["sliding_attention"] * 28})
    with pytest.raises(UsageError, match="'quantization_config'"):
        read_config({"model_type": "gemma3", "text_config": gemma3, "quantization_config": {"bits": 4}})
    with pytest.raises(UsageError, match="tie_word_embeddings is False, but True in text_config"):
        text = gemma3 | {"tie_word_embeddings": True}
        read_config({"model_type": "gemma3", "text_config": text, "tie_word_embeddings": False})
    with pytest.raises(UsageError, match="final_logit_softcapping in the text_config of a multimodal"):
        read_config({"model_type": "gemma3", "text_config": gemma3 | {"final_logit_softcapping": 30.0}})


def test_fields_that_change_nothing_are_accepted() -> None:
    neutral = {name: values[0] for name, values in NEUTRAL.items() if name not in FAMILIES["llama"].honoured}
    harmless = dict.fromkeys(HARMLESS - {"model_type", "architectures"}, "anything")
    assert read_config(LLAMA | neutral | harmless | {"unheard_of": None}) == read_config(LLAMA)
    assert read_config(LLAMA | {"unheard_of": 3}, assume_harmless=["unheard_of"]) == read_config(LLAMA)


def test_the_table_of_fields_has_no_contradiction() -> None:
    for family in FAMILIES.values():
        assert not family.honoured.keys() & (HARMLESS | family.harmless)
    assert not NEUTRAL.keys() & HARMLESS


def test_a_missing_field_has_the_value_that_transformers_assumes() -> None:
    assert read_config({"model_type": "qwen3"}).head_dim == 128
    assert read_config({"model_type": "mistral"}).windows == (4096,) * 32
    assert read_config({"model_type": "mistral", "sliding_window": None}).windows == ()
    assert read_config({"model_type": "llama"}).num_kv_heads == 32
    assert read_config({"model_type": "gemma2", "attn_logit_softcapping": None}).attention_softcap is None
    assert read_config({"model_type": "gemma2"}).attention_softcap == 50.0


def test_qwen_slides_from_max_window_layers_on() -> None:
    fields = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 26}
    config = read_config(PUBLISHED["Qwen2.5-7B"] | fields)
    assert config.windows == (None,) * 26 + (64, 64)


BASE = read_config(LLAMA)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, "llama"),
        ({"mlp_bias": True, "qkv_bias": True, "output_bias": True}, "llama"),
        ({"windows": (8,) * 32}, "mistral"),
        ({"qkv_bias": True}, "qwen2"),
        ({"qkv_bias": True, "windows": (None,) * 31 + (8,)}, "qwen2"),
        ({"qk_norm": True, "windows": (8,) * 31 + (None,)}, "qwen3"),
        ({"kv_head_of_query": tuple(range(32))}, "llama"),
    ],
)
def test_the_family_that_computes_the_same_is_found(fields: dict[str, Any], expected: str) -> None:
    assert write_config(dataclasses.replace(BASE, **fields), "float32")["model_type"] == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kv_head_of_query": (1, 0) * 16}, "kv_head_of_query"),
        ({"rope": None}, "rope"),
        ({"embed_scale": 2.0}, "embed_scale"),
        ({"attention_scale": 0.3}, "attention_scale"),
        ({"qk_norm": True, "windows": (8, 9) * 16}, "windows"),
        ({"mlp_bias": True, "qk_norm": True}, "mlp_bias|qk_norm"),
    ],
)
def test_what_no_family_computes_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=rf"no Hugging Face family computes this config.*({message})"):
        write_config(dataclasses.replace(BASE, **fields), "float32")
