"""Folders out: what is written reads back bit for bit, in one file or several."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from kvjax.attention import GroupedQuery
from kvjax.errors import UsageError
from kvjax.models.huggingface import export, load
from kvjax.models.language_model import LanguageModel
from kvjax.models.tokenizer import load_tokenizer
from tests.models.folders import small_tokenizer, write_folder, write_tokenizer
from tests.oracles import huggingface as oracle


@dataclasses.dataclass(frozen=True)
class Unknown(GroupedQuery):
    """A kind of attention that nobody has registered."""


CONFIGS = {"llama": oracle.LLAMA, "gemma": oracle.GEMMA}


def model_of(tmp_path: Path, family: str, dtype: str = "float32") -> LanguageModel:
    config = {**CONFIGS[family], "vocab_size": small_tokenizer().get_vocab_size()}
    folder = write_folder(tmp_path / "in", config, oracle.random_checkpoint(config))
    write_tokenizer(folder)
    return load(folder, dtype=dtype)


def assert_same(model: LanguageModel, other: LanguageModel) -> None:
    assert jax.tree.structure(model.params) == jax.tree.structure(other.params)
    for one, two in zip(jax.tree.leaves(model.params), jax.tree.leaves(other.params), strict=True):
        assert one.dtype == two.dtype
        np.testing.assert_array_equal(np.asarray(one, np.float32), np.asarray(two, np.float32))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family", CONFIGS)
def test_round_trip(tmp_path: Path, family: str, dtype: str) -> None:
    model = model_of(tmp_path, family, dtype)
    folder = export(model, tmp_path / "out" / "nested")
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    again = load(folder)
    assert again.config == model.config and again.name == "nested"
    assert_same(model, again)
    assert again.tokenizer.stop_ids == (1,) and again.tokenizer.encode("cache") == model.tokenizer.encode("cache")


def test_the_tensors_are_those_that_were_read(tmp_path: Path) -> None:
    """Bit for bit what another program wrote: no axis is confused where two sizes happen to agree."""
    model = model_of(tmp_path, "llama")
    export(model, tmp_path / "out")
    before, after = (safetensors.numpy.load_file(tmp_path / side / "model.safetensors") for side in ("in", "out"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        np.testing.assert_array_equal(after[name], tensor)


@pytest.mark.parametrize("limit", [1, 20_000, 70_000])
def test_shards(tmp_path: Path, limit: int) -> None:
    model = model_of(tmp_path, "llama")
    folder = export(model, tmp_path / "out", max_shard_bytes=limit)
    assert_same(model, load(folder))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(folder.glob("*.safetensors"))
    assert {path.name for path in files} == set(index["weight_map"].values()) and len(files) > 1
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    sizes = {path.name: sum(x.nbytes for x in safetensors.numpy.load_file(path).values()) for path in files}
    assert sum(sizes.values()) == index["metadata"]["total_size"] == 4 * model.num_params
    alone = {name for name, file in index["weight_map"].items() if list(index["weight_map"].values()).count(file) == 1}
    for name, file in index["weight_map"].items():
        assert sizes[file] <= limit or name in alone


def test_ids_are_written_for_generation(tmp_path: Path) -> None:
    model = model_of(tmp_path, "llama")
    tokenizer = dataclasses.replace(model.tokenizer, stop_ids=(1, 2))
    folder = export(dataclasses.replace(model, tokenizer=tokenizer), tmp_path / "out")
    for name in ("config.json", "generation_config.json"):
        ids = json.loads((folder / name).read_text())
        assert (ids["bos_token_id"], ids["eos_token_id"], ids["pad_token_id"]) == (0, [1, 2], 2)
    assert load(folder).tokenizer.stop_ids == (1, 2)


def test_without_a_tokenizer(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "in", oracle.LLAMA, oracle.random_checkpoint(oracle.LLAMA))
    out = export(load(folder), tmp_path / "out")
    assert {path.name for path in out.iterdir()} == {"config.json", "generation_config.json", "model.safetensors"}
    assert load_tokenizer(out).backend is None


def test_nothing_is_written_over_or_half(tmp_path: Path) -> None:
    model = model_of(tmp_path, "llama")
    export(model, tmp_path / "out")
    with pytest.raises(UsageError, match="not an empty folder"):
        export(model, tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="not an empty folder"):
        export(model, tmp_path / "file")
    embed = {"embed": {"embedding": jnp.zeros((3, 24))}}
    with pytest.raises(UsageError, match=r"embed/embedding has the shape \(3, 24\), the config asks for"):
        export(dataclasses.replace(model, params=model.params | embed), tmp_path / "bad")
    with pytest.raises(UsageError, match=r"\['extra/w'\] are not in the config's model"):
        export(dataclasses.replace(model, params=model.params | {"extra": {"w": jnp.zeros(1)}}), tmp_path / "bad")
    unknown = dataclasses.replace(model.config, attention=Unknown())
    with pytest.raises(UsageError, match="Unknown is not a part that kvjax knows"):
        export(dataclasses.replace(model, config=unknown), tmp_path / "bad")
    assert not (tmp_path / "bad").exists()
