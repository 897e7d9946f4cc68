"""`kvjax convert` as a user meets it: a folder in, a folder out, and one message where that cannot be."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from experiments import convert
from experiments.__main__ import main
from kvjax.attention import ProjectedKeys
from kvjax.models.config import TransformerConfig
from kvjax.models.language_model import LanguageModel
from kvjax.models.tokenizer import load_tokenizer
from kvjax.models.transformer import Transformer
from tests.models.folders import small_tokenizer, write_tokenizer

TEXT = "the cache keeps keys and values of the tokens that it has seen, and values of keys. " * 30
CONFIG = TransformerConfig(
    vocab_size=small_tokenizer().get_vocab_size(),
    embed_dim=16,
    num_layers=1,
    num_heads=4,
    num_kv_heads=4,
    head_dim=8,
    mlp_dim=16,
    max_positions=64,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    here = tmp_path_factory.mktemp("model")
    write_tokenizer(here)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(Transformer(CONFIG).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    params = jax.tree.map(lambda s: jnp.asarray(0.3 * rng.standard_normal(s.shape), jnp.float32), shapes)
    (here / "text.txt").write_text(TEXT)
    return kvjax.export(LanguageModel(CONFIG, params, load_tokenizer(here)), here / "model").parent


@pytest.fixture(autouse=True)
def no_folder_of_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    from experiments import compile_cache

    monkeypatch.setattr(compile_cache, "enable", lambda: None)


def run(folder: Path, out: Path, *options: str) -> int:
    here = ["--model", str(folder / "model"), "--text", str(folder / "text.txt"), "--out", str(out)]
    return main(["convert", *here, "--length", "32", "--batch", "4", *options])


@pytest.mark.parametrize("by", ["mean", "svd-activations"])
def test_a_folder_in_and_a_folder_out(folder: Path, tmp_path: Path, capsys: Any, by: str) -> None:
    assert run(folder, tmp_path / "out", "--heads", "2", "--by", by) == 0
    printed = capsys.readouterr().out
    lines = {line.split()[0]: line for line in printed.splitlines()}
    numbers = [float(re.findall(r"[\d.]+", lines[name])[0]) for name in ("before", "converted")]
    assert numbers[0] > 1 and numbers[1] != numbers[0] and "+0.0 %" in lines["before"]
    assert "128 to 64 bytes per token" in lines["cache"] and "recovered" not in lines
    made = kvjax.load(tmp_path / "out")
    expected = "llama" if by == "mean" else "kvjax"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == expected
    kept = dataclasses.replace(CONFIG, num_kv_heads=2)
    assert made.config == (kept if by == "mean" else dataclasses.replace(CONFIG, attention=ProjectedKeys(2)))
    assert kvjax.generate(made, "the cache", max_new_tokens=3).text is not None


def test_recovery_is_shown_behind_the_conversion(folder: Path, tmp_path: Path, capsys: Any) -> None:
    options = ("--heads", "2", "--by", "mean", "--recover", "lora", "--steps", "30", "--rate", "0.02", "--rank", "4")
    assert run(folder, tmp_path / "out", *options) == 0
    printed = capsys.readouterr().out.splitlines()
    shown = [line.split() for line in printed if line.split()[0] in ("before", "converted", "recovered")]
    assert [line[0] for line in shown] == ["before", "converted", "recovered"]
    assert float(shown[2][1]) < float(shown[1][1])
    model, text = kvjax.load(tmp_path / "out"), (folder / "text.txt").read_text()
    _, held = convert.windows(model, text, convert.Config(length=32))
    from kvjax.evaluation.text import read_windows

    np.testing.assert_allclose(read_windows(model, held.batches(4)).perplexity, float(shown[2][1]), atol=1e-3)


def test_latents(folder: Path, tmp_path: Path, capsys: Any) -> None:
    """All rotary heads and the channels of all values: as many bytes as before, and the same function."""
    assert run(folder, tmp_path / "out", "--to", "latent", "--latent-dim", "32", "--rotary-heads", "4") == 0
    shown = [
        line.split()[1] for line in capsys.readouterr().out.splitlines() if line.split()[0] in ("before", "converted")
    ]
    assert shown[0] == shown[1]
    assert "MultiHeadLatent" in repr(kvjax.load(tmp_path / "out").config.attention)


def test_what_is_measured_is_not_learnt_from(folder: Path) -> None:
    model = kvjax.load(folder / "model")
    seen, held = convert.windows(model, TEXT, convert.Config(length=32))
    ids = model.tokenizer.encode(TEXT, special=False)
    windows = [*zip(seen.tokens, seen.lengths, strict=True), *zip(held.tokens, held.lengths, strict=True)]
    joined = np.concatenate([row[1:length] for row, length in windows])
    np.testing.assert_array_equal(joined, ids[: len(joined)])
    assert len(held) == (len(seen) + len(held)) // 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), r"--to gqa needs --heads, a divisor of the model's 4"),
        (("--heads", "3"), "4 kv heads cannot become 3"),
        (("--heads", "2", "--length", "8"), "16 to 64 tokens"),
        (("--heads", "2", "--length", "65"), "16 to 64 tokens"),
        (("--heads", "2", "--samples", "0"), "at least 1"),
        (("--heads", "2", "--text", "nowhere.txt"), "cannot read the text nowhere.txt"),
        (("--heads", "2", "--model", "nowhere"), "cannot load a model from nowhere"),
        (("--heads", "2", "--recover", "all", "--steps", "0"), "at least one step"),
        (("--to", "latent"), "needs --latent-dim"),
    ],
)
def test_one_message_and_nothing_written(
    folder: Path, tmp_path: Path, capsys: Any, options: tuple[str, ...], message: str
) -> None:
    assert run(folder, tmp_path / "out", *options) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert re.search(message, said) and "Traceback" not in said
    assert not (tmp_path / "out").exists()


def test_what_is_missing_or_in_the_way_is_said_before_anything_is_read(
    folder: Path, tmp_path: Path, capsys: Any
) -> None:
    assert main(["convert", "--heads", "2", "--text", "t"]) == 2
    assert "--out FOLDER" in capsys.readouterr().err
    assert main(["convert", "--heads", "2", "--out", str(tmp_path / "out")]) == 2
    assert "--text FILE" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("kept")
    assert run(folder, tmp_path / "full", "--heads", "2") == 2
    assert "not an empty folder" in " ".join(capsys.readouterr().err.split())
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine"]


def test_one_window_is_too_little(folder: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "short.txt").write_text(TEXT[:150])
    assert run(folder, tmp_path / "out", "--heads", "2", "--text", str(tmp_path / "short.txt")) == 2
    assert "single window" in " ".join(capsys.readouterr().err.split())
