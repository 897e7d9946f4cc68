"""Folders in: logits against the slow NumPy decoders, and one clear error for whatever is wrong with a folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from kvjax.errors import CorruptDataError, UsageError
from kvjax.models.huggingface import load
from kvjax.models.language_model import LanguageModel
from tests.models.folders import small_tokenizer, write_folder, write_tokenizer
from tests.oracles import huggingface as oracle

TOKENS = np.random.default_rng(3).integers(0, 40, (2, 13))
FAMILIES = {"llama": (oracle.LLAMA, oracle.llama_logits), "gemma": (oracle.GEMMA, oracle.gemma_logits)}


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_the_numpy_decoder(tmp_path: Path, family: str, shards: int) -> None:
    config, reference = FAMILIES[family]
    tensors = oracle.random_checkpoint(config)
    model = load(write_folder(tmp_path / family, config, tensors, shards))
    logits, cache = jax.jit(LanguageModel.apply)(model, jnp.asarray(TOKENS, jnp.int32))
    assert cache is None and logits.dtype == jnp.float32 and model.name == family
    expected = np.stack([reference(config, tensors, row) for row in TOKENS])
    assert expected.std() > 0.5
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-5)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "model", oracle.LLAMA, oracle.random_checkpoint(oracle.LLAMA))


def edit_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit_tensors(folder: Path, edit: Callable[[dict[str, np.ndarray]], object]) -> None:
    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    edit(tensors)
    safetensors.numpy.save_file(tensors, path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", jnp.bfloat16, np.float16])
def test_dtype_is_that_of_the_parameters(folder: Path, dtype: Any) -> None:
    model = load(folder, dtype=dtype)
    assert {leaf.dtype for leaf in leaves(model.params)} == {jnp.dtype(dtype)}
    assert model.dtype == jnp.dtype(dtype)
    exact = load(folder)
    for cast, original in zip(leaves(model.params), leaves(exact.params), strict=True):
        np.testing.assert_array_equal(cast, original.astype(cast.dtype))


def leaves(tree: Any) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def test_dtype_comes_from_the_config_then_from_the_file(folder: Path) -> None:
    edit_config(folder, torch_dtype="bfloat16")
    assert load(folder).dtype == jnp.bfloat16
    edit_config(folder, dtype="float16", torch_dtype=None)
    assert load(folder).dtype == jnp.float16
    edit_config(folder, dtype=None)
    assert load(folder).dtype == jnp.float32
    with pytest.raises(UsageError, match="int8"):
        load(folder, dtype="int8")


def test_float16_overflow_is_refused(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors["model.norm.weight"].__setitem__(0, 7e4))
    load(folder, dtype="bfloat16")
    with pytest.raises(UsageError, match=r"model\.norm\.weight.*65504"):
        load(folder, dtype="float16")


def test_number_of_parameters(folder: Path) -> None:
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    assert load(folder).num_params == sum(tensor.size for tensor in tensors.values())


def test_multimodal_checkpoint_gives_its_text_model(tmp_path: Path) -> None:
    text = {**oracle.GEMMA, "final_logit_softcapping": None}
    config = {key: value for key, value in text.items() if key != "architectures"}
    tensors = oracle.random_checkpoint(text)
    outer = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "text_config": config}
    vision = {"vision_config": {"model_type": "siglip_vision_model"}, "mm_tokens_per_image": 4}
    plain = load(write_folder(tmp_path / "text", text, tensors))
    for prefix, tower in (("language_model.model.", ""), ("model.language_model.", "model.")):
        renamed = {prefix + name.removeprefix("model."): tensor for name, tensor in tensors.items()}
        renamed[f"{tower}vision_tower.weight"] = renamed[f"{tower}multi_modal_projector.w"] = np.ones(2, np.float32)
        model = load(write_folder(tmp_path / prefix, outer | vision, renamed))
        assert model.config == plain.config
        for read, expected in zip(leaves(model.params), leaves(plain.params), strict=True):
            np.testing.assert_array_equal(read, expected)


def test_a_stored_head_beside_tied_embeddings_must_be_the_embedding(folder: Path) -> None:
    edit_config(folder, tie_word_embeddings=True)
    with pytest.raises(CorruptDataError, match=r"lm_head\.weight.*differs.*tie_word_embeddings to false"):
        load(folder)
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}))
    assert "head" not in load(folder).params


def test_buffers_of_old_checkpoints_are_ignored(folder: Path) -> None:
    edit_tensors(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(5, np.float32)}))
    load(folder)


def rename(old: str, new: str) -> Callable[[dict[str, np.ndarray]], object]:
    return lambda tensors: tensors.__setitem__(new, tensors.pop(old))


K_PROJ = "model.layers.1.self_attn.k_proj.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(K_PROJ), r"model\.layers\.1\.self_attn\.k_proj\.weight' \[20, 24\] is missing; .*incomplete"),
        (lambda t: t.pop("lm_head.weight"), r"lm_head\.weight' \[40, 24\] is missing; set tie_word_embeddings"),
        (rename("model.embed_tokens.weight", "model.embed.weight"), r"embed_tokens.*missing.*'model\.embed\.weight'"),
        (
            lambda t: t.__setitem__(K_PROJ, t[K_PROJ].T.copy()),
            r"model\.safetensors.*k_proj\.weight' has the shape \[24, 20\].*asks for \[20, 24\]; correct",
        ),
        (
            lambda t: t.__setitem__("score.weight", np.ones((2, 24))),
            r"model\.safetensors.*'score\.weight' \[2, 24\] has no",
        ),
        (lambda t: t.__setitem__(K_PROJ, t[K_PROJ].astype(np.int8)), r"k_proj\.weight' holds int8 codes.*unquantised"),
    ],
    ids=["missing", "no head", "no embedding", "mis-shaped", "unexpected", "quantised"],
)
def test_tensor_errors_name_file_tensor_shapes_and_fix(
    folder: Path, edit: Callable[[dict[str, np.ndarray]], object], message: str
) -> None:
    edit_tensors(folder, edit)
    with pytest.raises(CorruptDataError, match=message):
        load(folder)


def test_not_a_model_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no such folder.*'reference'"):
        load(tmp_path / "nothing")
    with pytest.raises(UsageError, match=r"no config\.json"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CorruptDataError, match=r"config\.json is not JSON"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CorruptDataError, match="holds a list"):
        load(tmp_path)


def test_pickles_are_refused_with_the_way_out(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(UsageError, match=r"holds no \*\.safetensors"):
        load(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(UsageError, match=r"pytorch_model\.bin.*can run code.*safe_serialization"):
        load(folder)


def test_one_file_of_another_name_is_read_and_several_are_not(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    load(folder)
    shutil.copy(folder / "weights.safetensors", folder / "more.safetensors")
    with pytest.raises(UsageError, match=r"more\.safetensors, weights\.safetensors.*index\.json"):
        load(folder)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "sharded", oracle.LLAMA, oracle.random_checkpoint(oracle.LLAMA), shards=2)


def edit_index(folder: Path, tensor: str, file: str) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][tensor] = file
    path.write_text(json.dumps(index))


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "..", "a\\b", ""])
def test_an_index_may_only_name_files_beside_it(sharded: Path, name: str) -> None:
    edit_index(sharded, "model.norm.weight", name)
    with pytest.raises(CorruptDataError, match="may only name files beside it"):
        load(sharded)


def test_index_errors(sharded: Path) -> None:
    edit_index(sharded, "model.norm.weight", "model-00009-of-00002.safetensors")
    with pytest.raises(CorruptDataError, match=r"model-00009-of-00002\.safetensors, which is missing"):
        load(sharded)
    edit_index(sharded, "model.norm.weight", "model-00001-of-00002.safetensors")
    edit_index(sharded, "model.absent.weight", "model-00001-of-00002.safetensors")
    with pytest.raises(CorruptDataError, match=r"'model\.(absent|norm)\.weight' is in model-00001"):
        load(sharded)
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": []}))
    with pytest.raises(CorruptDataError, match="no weight_map"):
        load(sharded)


def test_tokenizer_and_stop_tokens(tmp_path: Path) -> None:
    size = small_tokenizer().get_vocab_size()
    config = {**oracle.LLAMA, "vocab_size": size, "eos_token_id": 2}
    folder = write_folder(tmp_path / "model", config, oracle.random_checkpoint(config))
    assert load(folder).tokenizer.backend is None
    with pytest.raises(UsageError, match=r"no tokenizer\.json"):
        load(folder).tokenizer.encode("text")
    write_tokenizer(folder)
    model = load(folder)
    assert model.tokenizer.vocab_size == size and model.tokenizer.stop_ids == (2,)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    assert load(folder).tokenizer.stop_ids == (1, 2)
    (folder / "generation_config.json").unlink()
    edit_config(folder, eos_token_id=None)
    assert load(folder).tokenizer.stop_ids == (1,), "the tokenizer's own </s>"


def test_bad_tokenizers(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(CorruptDataError, match=r"tokenizer\.json is not a tokenizer"):
        load(folder)
    write_tokenizer(folder)
    with pytest.raises(CorruptDataError, match=r"the model embeds 40; the tokenizer belongs to another model"):
        load(folder)


def test_the_reference_model_is_a_folder_like_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reference").mkdir()
    model = load("reference")
    assert model.name == "reference" and model.num_params <= 4_000_000
    assert model.config.num_heads >= 8 and model.config.num_kv_heads >= 2 and model.config.head_dim >= 32
    text = "def keep(self, tokens):\n    return tokens[-self.window :]\n"
    assert model.tokenizer.decode(model.tokenizer.encode(text)) == text
    assert max(model.tokenizer.encode(text)) < model.config.vocab_size
    with pytest.raises(UsageError, match=r"no config\.json"):
        load("./reference")
