"""DeepSeek-style folders without transformers: what config.json means, where tensors go, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.attention import AttentionConfig, MultiHeadLatent
from kvjax.attention.rope import RopeConfig, Yarn
from kvjax.errors import UsageError
from kvjax.models.huggingface import export, load
from kvjax.models.huggingface.config import read_config, write_config
from tests.models.folders import write_folder
from tests.oracles import latent as oracle

N, R, C, H, V, D, Q = 3, 8, 4, 6, 7, 12, 10
TINY = {
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "vocab_size": 11,
    "hidden_size": D,
    "intermediate_size": 9,
    "num_hidden_layers": 1,
    "num_attention_heads": N,
    "num_key_value_heads": N,
    "max_position_embeddings": 32,
    "q_lora_rank": Q,
    "kv_lora_rank": R,
    "qk_rope_head_dim": C,
    "qk_nope_head_dim": H,
    "v_head_dim": V,
    "first_k_dense_replace": 1,
    "rope_theta": 50.0,
    "torch_dtype": "float32",
}
# As published, but for its experts: every layer dense.
PUBLISHED = {
    **{key: TINY[key] for key in ("model_type", "architectures")},
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "first_k_dense_replace": 61,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "scoring_func": "sigmoid",
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "max_position_embeddings": 163840,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "attention_bias": False,
}
ATTENTION = {
    "q_a_proj.weight": (Q, D),
    "q_a_layernorm.weight": (Q,),
    "q_b_proj.weight": (N * (H + C), Q),
    "kv_a_proj_with_mqa.weight": (R + C, D),
    "kv_a_layernorm.weight": (R,),
    "kv_b_proj.weight": (N * (H + V), R),
    "o_proj.weight": (D, N * V),
}
OTHERS = {
    "model.embed_tokens.weight": (11, D),
    "model.norm.weight": (D,),
    "lm_head.weight": (11, D),
    "model.layers.0.input_layernorm.weight": (D,),
    "model.layers.0.post_attention_layernorm.weight": (D,),
    "model.layers.0.mlp.gate_proj.weight": (9, D),
    "model.layers.0.mlp.up_proj.weight": (9, D),
    "model.layers.0.mlp.down_proj.weight": (D, 9),
}


def checkpoint() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = OTHERS | {f"model.layers.0.self_attn.{name}": shape for name, shape in ATTENTION.items()}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def apart(x: np.ndarray) -> np.ndarray:
    """Channels in pairs side by side -> first of each pair, then second, as the oracle pairs them."""
    return np.concatenate([x[..., 0::2], x[..., 1::2]], axis=-1)


def as_paper(tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    """The equations' matrices from a checkpoint's tensors."""
    own = {name: tensors[f"model.layers.0.self_attn.{name}"].astype(np.float64) for name in ATTENTION}
    queries = own["q_b_proj.weight"].reshape(N, H + C, Q)
    up = own["kv_b_proj.weight"].reshape(N, H + V, R)
    down = own["kv_a_proj_with_mqa.weight"].T
    return {
        "W_DQ": own["q_a_proj.weight"].T,
        "q_norm": own["q_a_layernorm.weight"],
        "W_Q": np.stack([np.concatenate([q[:H].T, apart(q[H:].T)], axis=-1) for q in queries], axis=1),
        "W_DKV": down[:, :R],
        "W_KR": apart(down[:, R:]),
        "norm": own["kv_a_layernorm.weight"],
        "W_UK": np.stack([head[:H].T for head in up]),
        "W_UV": np.stack([head[H:].T for head in up]),
        "W_O": np.stack(np.split(own["o_proj.weight"].T, N)),
    }


def test_tensors_go_where_the_equations_have_them_and_back(tmp_path: Path) -> None:
    tensors = checkpoint()
    model = load(write_folder(tmp_path / "in", TINY, tensors))
    sizes = AttentionConfig(num_heads=N, num_kv_heads=N, head_dim=H, scale=H**-0.5)
    module = model.config.attention.module(sizes, jnp.float32, "attention")
    x = np.random.default_rng(1).standard_normal((1, 6, D)).astype(np.float32)
    positions = jnp.arange(6, dtype=jnp.int32)[None]
    given = {"positions": positions, "valid": positions >= 0, "rope": RopeConfig(50.0).table(C, jnp.int32(6))}
    out: Any = module.apply({"params": model.params["layers_0"]["attention"]}, jnp.asarray(x), **given)
    expected = oracle.attend(x[0].astype(np.float64), as_paper(tensors), theta=50.0)
    np.testing.assert_allclose(out[0][0], expected, rtol=0, atol=2e-5 * np.abs(expected).max())

    written = export(model, tmp_path / "out")
    assert json.loads((written / "config.json").read_text())["model_type"] == "deepseek_v3"
    again = load(written)
    assert again.config == model.config
    found = tensor_bytes(written)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(found[name], tensor, err_msg=name)


def tensor_bytes(folder: Path) -> dict[str, np.ndarray]:
    """The tensors of a folder, read as the format says: a length, a JSON header, and bytes."""
    raw = (folder / "model.safetensors").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    found = {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = (8 + size + offset for offset in entry["data_offsets"])
            found[name] = np.frombuffer(raw[begin:end], np.float32).reshape(entry["shape"])
    return found


def test_what_a_published_config_means() -> None:
    config = read_config(PUBLISHED)
    kind = config.attention
    assert isinstance(kind, MultiHeadLatent)
    assert (kind.latent_dim, kind.rotary_key_dim, kind.query_dim, kind.value_dim) == (512, 64, 1536, 128)
    assert (config.head_dim, config.num_kv_heads, kind.norm_eps, kind.normed) == (128, 128, 1e-6, True)
    np.testing.assert_allclose(kind.scale_factor, (0.1 * np.log(40) + 1) ** 2, rtol=1e-8)
    assert config.rope is not None
    assert isinstance(config.rope.scaling, Yarn) and config.rope.scaling.amplitude == 1.0
    written = write_config(config, "bfloat16")
    assert read_config(written) == config and written["rope_parameters"]["mscale_all_dim"] == 1.0


def test_default_settings_are_the_same_as_those_spelled_out() -> None:
    config = dataclasses.replace(read_config(TINY), attention=MultiHeadLatent(R, C, Q))
    written = write_config(config, "float32")
    assert (written["model_type"], written["v_head_dim"]) == ("deepseek_v3", H)
    assert written["q_lora_rank"] == Q and written["first_k_dense_replace"] == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"first_k_dense_replace": 0}, "layers from 0 on are mixtures of experts"),
        ({"rope_interleave": False}, "rope_interleave"),
        ({"attention_bias": True, "q_lora_rank": None}, "attention_bias without q_lora_rank"),
        ({"num_key_value_heads": 1}, "num_kv_heads is num_heads"),
        ({"kv_lora_rank": "8"}, "kv_lora_rank"),
        ({"qk_rope_head_dim": 3}, "odd"),
        ({"index_topk": 2048}, "index_topk"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_config(TINY | fields)


@pytest.mark.parametrize(
    "kind", [MultiHeadLatent(R, C, Q, normed=False), MultiHeadLatent(R, C, Q, scale_factor=1.5)], ids=["norm", "scale"]
)
def test_what_these_families_do_not_compute_is_not_written_as_them(kind: MultiHeadLatent) -> None:
    config = dataclasses.replace(read_config(TINY), attention=kind)
    with pytest.raises(UsageError, match=r"no Hugging Face family computes this config.*attention"):
        write_config(config, "float32")
