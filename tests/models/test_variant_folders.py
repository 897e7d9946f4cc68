"""Folders of models that transformers does not have: what is written reads back bit for bit, nothing else is read."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from kvjax import attention, describe
from kvjax.attention import AttentionKind, GroupedQuery, ProjectedKeys
from kvjax.attention.rope import Llama3, Yarn
from kvjax.errors import CorruptDataError, KvjaxError, UsageError
from kvjax.models.config import RopeConfig, TransformerConfig
from kvjax.models.huggingface import export, load, own, tensor_file
from kvjax.models.language_model import LanguageModel
from kvjax.models.tokenizer import load_tokenizer
from kvjax.models.transformer import Transformer
from tests.models.folders import small_tokenizer, write_tokenizer

VOCABULARY = small_tokenizer().get_vocab_size()
PLAIN = TransformerConfig(
    vocab_size=VOCABULARY,
    embed_dim=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=24,
    max_positions=64,
)
CHANGES: dict[str, dict[str, Any]] = {
    "another kind of attention": {"attention": ProjectedKeys(1), "qkv_bias": True, "output_bias": True},
    "shared layers": {"kv_layers": (0, 0), "qk_norm": True},
    "groups of unequal size": {"kv_head_of_query": (0, 1, 1, 1), "num_heads": 4},
    "no rotary embedding": {"rope": None, "embed_scale": 0.1 + 0.2, "windows": (None, 7)},
    "two rotary embeddings": {
        "attention": ProjectedKeys(2),
        "windows": (None, 7),
        "rope": RopeConfig(1e5 / 3, Yarn(4.0, 16, truncate=False)),
        "local_rope": RopeConfig(1e4, Llama3(8.0, 1.0, 4.0, 32)),
    },
}


def make(dtype: Any = jnp.float32, **changes: Any) -> LanguageModel:
    config = dataclasses.replace(PLAIN, **changes)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(Transformer(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    draw: Callable[[Any], Any] = lambda s: jnp.asarray(0.3 * rng.standard_normal(s.shape), dtype)  # noqa: E731
    return LanguageModel(config, jax.tree.map(draw, shapes))


def assert_same(one: LanguageModel, other: LanguageModel) -> None:
    assert one.config == other.config and hash(one.config) == hash(other.config)
    pairs = [jax.tree_util.tree_flatten_with_path(model.params)[0] for model in (one, other)]
    assert [path for path, _ in pairs[0]] == [path for path, _ in pairs[1]]
    for (path, a), (_, b) in zip(*pairs, strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes(), path


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_round_trip(tmp_path: Path, changes: dict[str, Any], dtype: Any) -> None:
    model = make(dtype, **changes)
    folder = export(model, tmp_path / "out")
    assert json.loads((folder / "config.json").read_text())["model_type"] == "kvjax"
    assert_same(model, load(folder))


def test_what_transformers_has_is_written_for_it(tmp_path: Path) -> None:
    """Also where it is spelt in an unusual way."""
    for name, changes in {"a": {}, "b": {"kv_layers": (0, 1), "kv_head_of_query": (0, 0, 1, 1)}}.items():
        folder = export(make(**changes), tmp_path / name)
        assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"


def test_each_tensor_keeps_its_dtype_unless_one_is_asked_for(tmp_path: Path) -> None:
    model = make(jnp.bfloat16, attention=ProjectedKeys(1))
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: x.astype(jnp.float32) if "norm" in str(path) else x, model.params
    )
    mixed = dataclasses.replace(model, params=params)
    folder = export(mixed, tmp_path / "out")
    assert_same(mixed, load(folder))
    asked = load(folder, dtype="float16")
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(asked.params)} == {"float16"}


def test_tensors_are_the_parameter_tree(tmp_path: Path) -> None:
    """As another program reads the file: names are paths, axes are not turned round."""
    model = make(attention=ProjectedKeys(1))
    export(model, tmp_path / "out")
    stored = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    flat = {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(model.params)[0]
    }
    assert stored.keys() == flat.keys() and "layers_1.attention.key_basis" in stored
    for name, leaf in flat.items():
        np.testing.assert_array_equal(stored[name], leaf)


def test_shards_tokenizer_and_stop_ids(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    model = dataclasses.replace(make(attention=ProjectedKeys(1)), tokenizer=load_tokenizer(tmp_path, (1, 2)))
    folder = export(model, tmp_path / "out", max_shard_bytes=4000)
    assert len(list(folder.glob("*.safetensors"))) > 1
    again = load(folder)
    assert_same(model, again)
    assert again.tokenizer.stop_ids == (1, 2) and again.tokenizer.encode("cache") == model.tokenizer.encode("cache")


def test_the_loaded_model_computes_the_same(tmp_path: Path) -> None:
    model = make(attention=ProjectedKeys(1))
    tokens = jnp.arange(12)[None] % VOCABULARY
    again = load(export(model, tmp_path / "out"))
    apply = jax.jit(LanguageModel.apply)
    np.testing.assert_array_equal(apply(again, tokens)[0], apply(model, tokens)[0])


def kinds() -> dict[str, type]:
    members = (getattr(attention, name) for name in attention.__all__)
    found = (x for x in members if isinstance(x, type) and issubclass(x, AttentionKind) and not inspect.isabstract(x))
    return {cls.__name__: cls for cls in found}


def test_every_exported_kind_can_be_named() -> None:
    assert kinds().keys() <= own.PARTS.keys() and len(kinds()) > 2
    for cls in kinds().values():
        if all(field.default is not dataclasses.MISSING for field in dataclasses.fields(cls)):
            described = json.loads(json.dumps(describe.to_json(cls(), own.PARTS, "")))
            assert describe.from_json(described, AttentionKind, own.PARTS) == cls()


@dataclasses.dataclass(frozen=True)
class Ours(GroupedQuery):
    """A kind of a user's own."""

    strength: float = 1.0


def test_a_kind_of_ones_own_is_registered_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(attention=Ours(0.5))
    with pytest.raises(UsageError, match=r"Ours is not a part that kvjax knows.*kvjax\.models\.huggingface\.register"):
        export(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(own, "PARTS", dict(own.PARTS))
    own.register(Ours)
    folder = export(model, tmp_path / "out")
    assert_same(model, load(folder))
    monkeypatch.undo()
    with pytest.raises(UsageError, match=r"unknown part 'Ours'\..*has to be registered before"):
        load(folder)


def folder_of(tmp_path: Path) -> Path:
    return export(make(attention=ProjectedKeys(1)), tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention": {"part": "os.system"}}, "unknown part 'os.system'"),
        ({"attention": {"part": "ProjectedKey", "heads": 1}}, "Did you mean 'ProjectedKeys'"),
        ({"attention": {"part": "RopeConfig"}}, "expected a AttentionKind, got the part 'RopeConfig'"),
        ({"attention": {"part": "ProjectedKeys", "head": 1}}, "ProjectedKeys has no field 'head'"),
        ({"attention": {"part": "ProjectedKeys", "heads": "1"}}, "ProjectedKeys.heads must be int, got '1'"),
        ({"attention": {"part": "ProjectedKeys"}}, "ProjectedKeys cannot be made"),
        ({"attention": {"part": "ProjectedKeys", "heads": 3}}, "not a multiple of heads=3"),
        ({"rope": {"part": "RopeConfig", "scaling": {"part": "RopeConfig"}}}, "expected a Scaling"),
        ({"num_layers": 0}, "num_layers must be at least 1"),
        ({"layers": 2}, "TransformerConfig has no field 'layers'"),
    ],
)
def test_a_config_that_is_not_ours_is_refused_by_name(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    folder = folder_of(tmp_path)
    json_of = json.loads((folder / "config.json").read_text())
    json_of["model"] |= change
    (folder / "config.json").write_text(json.dumps(json_of))
    with pytest.raises(UsageError, match=r"^config\.json: model: ") as error:
        load(folder)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format 2 of model_type 'kvjax' is not 1"),
        ({"model": None}, "expected a TransformerConfig, got None"),
        ({"hidden_size": 3}, "has no field 'hidden_size'"),
    ],
)
def test_other_formats_and_fields_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    folder = folder_of(tmp_path)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UsageError) as error:
        load(folder)
    assert message in str(error.value)
    if "hidden_size" in change:
        load(folder, assume_harmless=["hidden_size"])


Tensors = dict[str, np.ndarray[Any, Any]]
BASIS = "layers_0.attention.key_basis"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {k: v for k, v in t.items() if k != BASIS}, "is missing"),
        (lambda t: t | {"layers_2.extra": np.ones(1, np.float32)}, "'layers_2.extra' has no place"),
        (lambda t: t | {BASIS: t[BASIS][:, :4]}, "has the shape"),
        (lambda t: t | {BASIS: t[BASIS].astype(np.int8)}, "quantised"),
        (lambda t: t | {BASIS: t[BASIS].astype(np.float64)}, "is float64, which jax would shorten"),
    ],
)
def test_tensors_that_do_not_belong_are_refused(
    tmp_path: Path, change: Callable[[Tensors], Tensors], message: str
) -> None:
    folder = folder_of(tmp_path)
    path = folder / "model.safetensors"
    safetensors.numpy.save_file(change(safetensors.numpy.load_file(path)), path)
    with pytest.raises(CorruptDataError) as error:
        load(folder)
    assert message in str(error.value)


@pytest.mark.parametrize("empty", [False, True], ids=["new folder", "empty folder"])
def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty: bool) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensor_file, "write", full)
    if empty:
        (tmp_path / "out").mkdir()
    with pytest.raises(KvjaxError, match="No space left"):
        export(make(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == ([tmp_path / "out"] if empty else [])
    assert not empty or not list((tmp_path / "out").iterdir())
