"""The study of fewer kv heads: every way is measured, once, beside the model as it is."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from experiments import compile_cache, study, uptrain
from kvjax import assets
from kvjax.convert import recover
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


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> uptrain.Config:
    write_tokenizer(tmp_path)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(Transformer(CONFIG).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    params = jax.tree.map(lambda s: jnp.asarray(0.3 * rng.standard_normal(s.shape), jnp.float32), shapes)
    folder = kvjax.export(LanguageModel(CONFIG, params, load_tokenizer(tmp_path)), tmp_path / "model")
    monkeypatch.setattr(study, "text", lambda path: TEXT)
    monkeypatch.setattr(assets, "heldout_text", lambda: TEXT[7:])
    monkeypatch.setattr(compile_cache, "enable", lambda: None)
    monkeypatch.setattr(uptrain, "WAYS", ("as it is", "mean", "svd-activations", f"svd-activations{uptrain.ALIKE}"))
    sizes: dict[str, Any] = {"samples": 4, "held": 5, "length": 32, "batch": 2, "steps": 2}
    return uptrain.Config(out=tmp_path / "run", model=str(folder), models=("grouped",), **sizes)


def test_a_table_and_a_record_that_is_gone_on_with(
    config: uptrain.Config, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    uptrain.main(config)
    first = capsys.readouterr().out
    rows = [line.split(" | ") for line in first.splitlines() if line.startswith("| ")][2:]
    assert [row[0].removeprefix("| ") for row in rows] == list(uptrain.WAYS)
    assert [row[1] for row in rows] == ["128", "64", "64", "64"]
    assert rows[0][3] == "1" and rows[1][3] != "1"
    records = json.loads((config.out / "records.json").read_text())
    assert len(records) == 4 and all(len(record["converted"]) == 5 for record in records.values())

    def never(*_: Any) -> None:
        raise AssertionError("what is in the records is not measured again")

    monkeypatch.setattr(recover, "recover", never)
    uptrain.main(config)
    assert capsys.readouterr().out == first
    with pytest.raises(AssertionError, match="not measured again"):
        uptrain.main(dataclasses.replace(config, steps=3))
