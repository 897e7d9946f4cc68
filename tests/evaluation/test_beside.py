"""Models beside each other: the same questions, names that tell them apart, and sizes as shares of one cache."""

from __future__ import annotations

import dataclasses
import types

import pytest

import kvjax
from kvjax.attention import MultiHeadLatent
from kvjax.errors import UsageError
from kvjax.evaluation.beside import config_of, plans
from kvjax.evaluation.plan import Options
from kvjax.models.language_model import LanguageModel
from tests.evaluation.tiny import tiny

OPTIONS = Options(context=128, seeds=1, examples=2, batch=2)


@pytest.fixture(scope="module")
def latent() -> LanguageModel:
    return tiny(3.0, name="latent", num_kv_heads=4, attention=MultiHeadLatent(latent_dim=16, rotary_key_dim=8))


@pytest.mark.usefixtures("lone")
def test_rows_of_both_are_there_and_sizes_are_of_the_first(model: LanguageModel, latent: LanguageModel) -> None:
    told = kvjax.compare(
        model, ["int8"], ["kv"], context=128, seeds=1, examples=2, batch=2, beside=[latent], progress=None
    )
    rows = {row.method: row for row in told.rows}
    assert list(rows) == ["full", "int8", "latent/full", "latent/int8"]
    assert rows["latent/full"].ratio == pytest.approx(
        rows["latent/full"].cache_bytes / rows["full"].cache_bytes, rel=0.03
    )
    assert rows["latent/full"].cache_bytes / rows["full"].cache_bytes == pytest.approx((16 + 8) / (2 * 2 * 32), rel=0.1)
    assert rows["latent/full"].kl == 0 == rows["full"].kl
    assert "latent/int8" in str(told) and told.config["model"] == "tiny, latent"
    assert {len(row.scores) for row in told.rows} == {1}


@pytest.mark.usefixtures("lone")
def test_what_is_done_is_not_measured_again(model: LanguageModel, latent: LanguageModel) -> None:
    first, second = plans([model, latent], ["int8"], ["kv"], OPTIONS)
    done = [{"method": name, "task": "kv", "context": 128, "seed": 0} for name in ("full", "int8", "latent/full")]
    assert list(first.run(done)) == []
    left = list(second.run(done))
    assert [record["method"] for record in left] == ["latent/int8"]
    assert config_of([first, second])["methods"] == ["full", "int8", "latent/full", "latent/int8"]


def test_models_that_cannot_be_compared_are_refused(model: LanguageModel) -> None:
    with pytest.raises(UsageError, match="same name"):
        plans([model, model], ["int8"], ["kv"], OPTIONS)
    words = types.SimpleNamespace(encode=lambda text: list(text.encode()))
    other = dataclasses.replace(model, name="other", tokenizer=words)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UsageError, match="another tokenizer"):
        plans([model, other], ["int8"], ["kv"], OPTIONS)
