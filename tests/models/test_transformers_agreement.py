"""Agreement with Hugging Face transformers on CPU: logits, greedy text and the way back, for every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the extra `hf` (torch, transformers) is not installed")
transformers = pytest.importorskip("transformers", reason="the extra `hf` (torch, transformers) is not installed")

from kvjax.attention.rope import Dynamic  # noqa: E402
from kvjax.models.huggingface import export, load  # noqa: E402
from kvjax.models.language_model import LanguageModel  # noqa: E402
from tests.models.folders import small_tokenizer, write_folder, write_tokenizer  # noqa: E402
from tests.oracles import huggingface as oracle  # noqa: E402

PROMPT, NEW = 8, 64
TOTAL = PROMPT + NEW
TOLERANCE = 1e-4

SIZES = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
GEMMA = SIZES | {"head_dim": 16, "sliding_window": 11, "query_pre_attn_scalar": 24}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LATENT = SIZES | {
    "num_key_value_heads": 4,
    "first_k_dense_replace": 2,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 10,
}

# name -> (config class, what differs from SIZES)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", SIZES),
    "llama biases": ("LlamaConfig", SIZES | {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"}),
    "llama wide heads, one kv head, tied": (
        "LlamaConfig",
        SIZES | {"head_dim": 20, "num_key_value_heads": 1, "tie_word_embeddings": True},
    ),
    "llama one kv head per query head": ("LlamaConfig", SIZES | {"num_key_value_heads": 4, "rms_norm_eps": 1e-2}),
    "llama linear": ("LlamaConfig", SIZES | {"rope_parameters": {"rope_type": "linear", "factor": 2.5}}),
    "llama dynamic, within": ("LlamaConfig", SIZES | {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}),
    "llama dynamic, beyond": (
        "LlamaConfig",
        SIZES | {"max_position_embeddings": 24, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
    ),
    "llama llama3": ("LlamaConfig", SIZES | {"rope_parameters": LLAMA3 | {"rope_theta": 500.0}}),
    "llama yarn": ("LlamaConfig", SIZES | {"rope_parameters": YARN}),
    "llama yarn, all keys": (
        "LlamaConfig",
        SIZES
        | {
            "rope_parameters": YARN
            | {"beta_fast": 8.0, "beta_slow": 2.0, "truncate": False, "mscale": 1.2, "mscale_all_dim": 0.7}
        },
    ),
    "llama yarn, attention factor": (
        "LlamaConfig",
        SIZES | {"rope_parameters": YARN | {"attention_factor": 0.8, "rope_theta": 1e6}},
    ),
    "mistral": ("MistralConfig", SIZES | {"sliding_window": None, "head_dim": 32}),
    "mistral window": ("MistralConfig", SIZES | {"sliding_window": 9}),
    "qwen2": ("Qwen2Config", SIZES | {"tie_word_embeddings": True}),
    "qwen2 window": (
        "Qwen2Config",
        SIZES | {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3Config", SIZES | {"head_dim": 16}),
    "qwen3 biases, window": (
        "Qwen3Config",
        SIZES
        | {
            "head_dim": 16,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 7,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "gemma2": ("Gemma2Config", GEMMA),
    "gemma2 tight caps": (
        "Gemma2Config",
        GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "attention_bias": True},
    ),
    "gemma2 no caps": (
        "Gemma2Config",
        GEMMA | {"attn_logit_softcapping": None, "final_logit_softcapping": None, "tie_word_embeddings": False},
    ),
    "gemma3": ("Gemma3TextConfig", GEMMA | {"num_hidden_layers": 3, "sliding_window_pattern": 3}),
    "gemma3 scaled global rope": (
        "Gemma3TextConfig",
        GEMMA
        | {
            "layer_types": ["full_attention", "sliding_attention"],
            "final_logit_softcapping": 20.0,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
    ),
    "deepseek_v3": ("DeepseekV3Config", LATENT | {"rms_norm_eps": 1e-2}),
    "deepseek_v3 queries without a latent, yarn": (
        "DeepseekV3Config",
        LATENT
        | {
            "q_lora_rank": None,
            "rope_parameters": YARN | {"rope_theta": 1e4, "mscale": 1.1, "mscale_all_dim": 0.8},
        },
    ),
    "deepseek_v2 biases": ("DeepseekV2Config", LATENT | {"attention_bias": True, "mlp_bias": True}),
}


def randomise(model: Any, seed: int = 0) -> Any:
    """Weights large enough that every part shows in the logits: a default initialisation hides most mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise if "embed" in name else noise / parameter.shape[-1] ** 0.5)
            else:
                parameter.copy_(0.3 * noise + (0.0 if name.endswith("bias") else 1.0))
    return model.eval().float()


def make(name: str) -> Any:
    kind, fields = CASES[name]
    config = getattr(transformers, kind)(**fields, eos_token_id=None, bos_token_id=None, pad_token_id=None)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return randomise(model)


@pytest.fixture(scope="module", params=CASES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, LanguageModel, Path]:
    theirs = make(request.param)
    folder = tmp_path_factory.mktemp("hf")
    theirs.save_pretrained(folder)
    return theirs, load(folder), folder


@jax.jit
def forward(model: LanguageModel, tokens: jax.Array, valid: jax.Array) -> jax.Array:
    return model.apply(tokens, valid=valid)[0]


def logits_of(model: LanguageModel, tokens: np.ndarray) -> np.ndarray:
    """Logits of [B, n] tokens through one compiled shape [B, TOTAL]."""
    padded = np.zeros((len(tokens), TOTAL), np.int32)
    padded[:, : tokens.shape[1]] = tokens
    valid = np.broadcast_to(np.arange(TOTAL) < tokens.shape[1], padded.shape)
    return np.asarray(forward(model, padded, valid))[:, : tokens.shape[1]]


def reference_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(tokens, dtype=torch.long), use_cache=False).logits.numpy()


def prompts(vocab: int, length: int = PROMPT) -> np.ndarray:
    return np.random.default_rng(1).integers(0, vocab, (2, length), dtype=np.int32)


def test_logits_agree(pair: tuple[Any, LanguageModel, Path]) -> None:
    theirs, ours, _ = pair
    tokens = prompts(ours.config.vocab_size, TOTAL)
    expected = reference_logits(theirs, tokens)
    assert expected.std() > 0.3, "the reference itself is nearly constant: the comparison would show nothing"
    np.testing.assert_allclose(logits_of(ours, tokens), expected, rtol=0, atol=TOLERANCE)


def test_greedy_text_agrees(pair: tuple[Any, LanguageModel, Path]) -> None:
    theirs, ours, _ = pair
    prompt = prompts(ours.config.vocab_size)
    expected = theirs.generate(
        torch.tensor(prompt, dtype=torch.long),
        attention_mask=torch.ones(prompt.shape, dtype=torch.long),
        max_new_tokens=NEW,
        do_sample=False,
        # Under dynamic scaling, a cache of keys rotated earlier is another computation than the full forward pass.
        use_cache=ours.config.rope is not None and not isinstance(ours.config.rope.scaling, Dynamic),
    ).numpy()
    text = prompt
    for _ in range(NEW):
        following = logits_of(ours, text)[:, -1].argmax(-1)
        text = np.concatenate([text, following[:, None].astype(np.int32)], axis=1)
    for row, reference in zip(text, expected, strict=True):
        differing = np.flatnonzero(row != reference)
        if differing.size:
            last = reference_logits(theirs, reference[None, : differing[0]])[0, -1]
            gap = np.diff(np.sort(last)[-2:])[0]
            assert gap < TOLERANCE, f"split at token {differing[0]}, where the reference's top-2 gap is {gap}"


def test_export_gives_the_same_logits_in_transformers(pair: tuple[Any, LanguageModel, Path], tmp_path: Path) -> None:
    theirs, ours, _ = pair
    export(ours, tmp_path / "out", max_shard_bytes=40_000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    again, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    tokens = prompts(ours.config.vocab_size, TOTAL)
    np.testing.assert_allclose(reference_logits(again, tokens), reference_logits(make_again(theirs), tokens), atol=1e-6)


def test_multimodal_gemma3_gives_its_text_model(tmp_path: Path) -> None:
    text = GEMMA | {"sliding_window_pattern": 2}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
    }
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    config.image_token_index = config.boi_token_index = config.eoi_token_index = 95
    theirs = randomise(transformers.Gemma3ForConditionalGeneration(config))
    theirs.set_attn_implementation("eager")
    theirs.save_pretrained(tmp_path)
    ours = load(tmp_path)
    tokens = prompts(95, TOTAL)
    expected = reference_logits(theirs, tokens)
    np.testing.assert_allclose(logits_of(ours, tokens), expected, rtol=0, atol=TOLERANCE)


def test_bfloat16_checkpoints_are_read_bit_for_bit(tmp_path: Path) -> None:
    theirs = make("qwen3").to(torch.bfloat16)
    theirs.save_pretrained(tmp_path)
    ours = load(tmp_path)
    assert ours.dtype == jnp.bfloat16
    kernel = np.asarray(ours.params["layers_1"]["attention"]["o"]["kernel"].astype(jnp.float32))
    expected = theirs.model.layers[1].self_attn.o_proj.weight.detach().float().numpy()
    np.testing.assert_array_equal(kernel.reshape(-1, 48).T, expected)


def test_exported_tokenizer_and_chat_template_are_the_same_in_transformers(tmp_path: Path) -> None:
    config = {**oracle.LLAMA, "vocab_size": small_tokenizer().get_vocab_size()}
    folder = write_folder(tmp_path / "in", config, oracle.random_checkpoint(config))
    write_tokenizer(folder)
    ours = load(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(export(ours, tmp_path / "out"))
    text = "the cache keeps keys, naïvely 🙂\n"
    assert theirs(text)["input_ids"] == ours.tokenizer.encode(text, special=True)
    ids = ours.tokenizer.encode(text, special=True)
    assert theirs.decode(ids, skip_special_tokens=True) == ours.tokenizer.decode(ids)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 1, 2)
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes?"}]
    for prompted in (True, False):
        expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompted)
        assert ours.tokenizer.chat(messages, add_generation_prompt=prompted) == expected
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (0, 1, 2)


def make_again(model: Any) -> Any:
    """A copy without the state that dynamic rotary scaling leaves behind."""
    fresh = type(model)(model.config)
    fresh.load_state_dict(model.state_dict())
    return fresh.eval()
