"""The study of variants: equal parameters, bytes as claimed, and a run that goes on where it stopped."""

from __future__ import annotations

import json

import numpy as np
import pytest

import kvjax
from experiments import variants
from experiments.variant import models
from experiments.variant.measure import Data, bytes_per_token
from experiments.variant.rows import KEYS, RECORDS, SYMBOLS, TOLD_AGAIN, TOLD_ONCE, VALUES
from kvjax.errors import UsageError
from kvjax.training.data import TEXT
from kvjax.training.schedule import Stage

START = models.base(1024, 128, 4, 128)


@pytest.mark.parametrize("name", models.CHANGES)
def test_every_variant_has_as_many_parameters(name: str) -> None:
    goal = models.parameters(models.variant(models.LEADER, START))
    assert models.parameters(models.variant(name, START)) == pytest.approx(goal, rel=5e-3)


def test_caches_are_as_small_as_the_variants_say() -> None:
    """Bytes per token and layer: keys and values of 16 channels in bfloat16, and a position for all heads."""
    exact = {name: bytes_per_token(models.variant(name, START), tokens=1 << 16) for name in models.CHANGES}
    heads, layers = START.num_kv_heads, START.num_layers
    per_head, position = 2 * 16, 4
    of = {
        "mha": 2 * START.num_heads * per_head + position,
        "gqa": 2 * heads * per_head + position,
        "mqa": 2 * per_head + position,
        "shared layers": heads * per_head + position / 2,
        "diffqkv": (heads // 2 + heads) * per_head + position,
        "diffqkv, half keys": (heads // 4 + heads) * per_head + position,
        "ssa": 2 * heads * per_head + position,
        "selective": 2 * heads * per_head + 2 * position,
        "mla": 2 * (8 * heads + 8 + 8) + position,
        "kdgqa": 2 * heads * per_head + position,
    }
    assert exact == pytest.approx({name: layers * size for name, size in of.items()}, rel=1e-2)


@pytest.mark.parametrize("length", [16, 128])
def test_answers_are_the_last_values_that_were_told(length: int) -> None:
    data = Data.load()
    batch = data.rows(data.seen, 3, 4096).batch(7, Stage(length, 1, 0.0, 0.0, 0.0, 0.0))
    assert batch.tokens.shape == batch.answer.shape == batch.text.shape == (4096 // length, length + 1)
    assert set(batch.family.tolist()) == {TEXT, TOLD_ONCE, TOLD_AGAIN}
    for row, answer, text, family in zip(batch.tokens, batch.answer, batch.text, batch.family, strict=True):
        assert tuple(row[: len(data.prefix)]) == data.prefix and not answer[0] and not text[0]
        assert text.any() == (family == TEXT) and answer.any() == (family != TEXT)
        held: dict[int, int] = {}
        told = 0
        for place in np.flatnonzero(~text)[len(data.prefix) :]:
            symbol = int(row[place]) - data.words
            if symbol < RECORDS:
                told += 1
                held[symbol // VALUES] = symbol % VALUES
            elif answer[place]:
                assert symbol - RECORDS - KEYS == held[int(row[place - 1]) - data.words - RECORDS]
        assert told == len(held) or family == TOLD_AGAIN


@pytest.mark.slow
def test_a_run_trains_measures_and_goes_on(tmp_path, capsys) -> None:
    config = variants.Config(
        out=tmp_path / "run", variants=("gqa", "mla"), seeds=1, steps=3, batch_tokens=512, length=64, eval_batches=1
    )
    variants.main(config)
    table = capsys.readouterr().out
    found = [json.loads(line) for line in (config.out / "results.jsonl").read_text().splitlines()]
    assert [record["variant"] for record in found] == ["gqa", "mla"]
    assert found[1]["bytes full"] < found[0]["bytes full"]
    assert all(5 < record["text"] < 8 for record in found)
    assert all(0 <= record[kind] < 0.5 for record in found for kind in ("told once", "told again"))
    assert "| mla |" in table
    variants.main(config)
    assert capsys.readouterr().out == table
    assert len((config.out / "results.jsonl").read_text().splitlines()) == 2
    loaded = kvjax.load(config.out / "mla-0" / "model")
    assert loaded.config.cache_shape(0) == models.variant("mla", models.base(1024 + SYMBOLS, 64, 2, 64)).cache_shape(0)


def test_what_cannot_be_is_said_before_anything_is_trained(tmp_path) -> None:
    with pytest.raises(UsageError, match="unknown variant 'mqq'"):
        variants.main(variants.Config(out=tmp_path / "a", variants=("mqq",)))
    with pytest.raises(UsageError, match="multiple of 64"):
        variants.main(variants.Config(out=tmp_path / "a", embed_dim=96))
    assert not (tmp_path / "a").exists()
