"""Models beside each other: the same questions, names that tell them apart, and sizes as shares of one cache."""

from __future__ import annotations

import dataclasses
import types
from typing import Any

import numpy as np
import pytest

import kvjax
from kvjax.attention import (
    DiffQKV,
    FFNified,
    KeyDriven,
    LayerMaps,
    MultiHeadLatent,
    ProjectedKeys,
    SelectiveAttention,
    SelfSelective,
)
from kvjax.cache.plan import layer_bytes
from kvjax.engine.prefill import cache_dims
from kvjax.errors import UsageError
from kvjax.evaluation.batch import Batch
from kvjax.evaluation.beside import config_of, plans
from kvjax.evaluation.plan import Options
from kvjax.evaluation.setting import Setting
from kvjax.evaluation.workload import WORKLOADS, Source
from kvjax.models.embedding import DrawnEmbedding
from kvjax.models.language_model import LanguageModel
from tests.evaluation.tiny import tiny
from tests.thin import thinned

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


VARIANTS: dict[str, dict[str, Any]] = {
    "ffnified": {"attention": FFNified(), "rope": None},
    "multi-query": {"num_kv_heads": 1},
    "lexinvariant": {"embedding": DrawnEmbedding()},
    "shared": {"kv_layers": (0, 0)},
    "kdgqa": {"attention": KeyDriven()},
    "dgqa": {"attention": LayerMaps(((0, 0, 0, 1), (0, 1, 1, 1)))},
    "projected": {"num_kv_heads": 4, "attention": ProjectedKeys(heads=2)},
    "ssa": {"attention": SelfSelective()},
    "selective": {"attention": SelectiveAttention()},
    "diffqkv": {"num_kv_heads": 1, "attention": DiffQKV(value_heads=2, key_dim=16)},
}


@pytest.mark.usefixtures("lone")
@pytest.mark.parametrize("name", thinned(VARIANTS))
def test_every_variant_has_rows_with_bytes_and_score(name: str, model: LanguageModel) -> None:
    other = tiny(3.0, name=name, **VARIANTS[name])
    tasks = ["kv", "perplexity-stream"] if name in ("ffnified", "lexinvariant") else ["kv"]
    told = kvjax.compare(
        model,
        ["int8"],
        tasks,
        context=128,
        seeds=1,
        examples=2,
        batch=2,
        beside=[other],
        attention_errors=False,
        progress=None,
    )
    rows = {row.method: row for row in told.rows}
    stateful = name == "ffnified"
    assert list(rows) == ["full", "int8", f"{name}/full", *([] if stateful else [f"{name}/int8"])]
    row, whole = rows[f"{name}/full"], rows["full"]
    planned = [layer_bytes(kvjax.methods.full(), dims) for dims in cache_dims(other, 2, 96, 128)]
    assert row.cache_bytes == sum(round(size / 2) for size in planned)
    assert row.ratio == pytest.approx(whole.ratio * row.cache_bytes / whole.cache_bytes)
    assert set(row.scores) == {"kv"} and len(row.perplexity) == len(tasks) - 1 and row.kl == 0
    assert row.attention_error is None and ("keeps no keys" in " ".join(row.notes)) == stateful


@pytest.mark.parametrize("method", ["full", "kvzip", "streaming"])
def test_a_draw_follows_from_the_row_alone(method: str, setting: Setting, source: Source) -> None:
    """A row has the same embeddings alone and behind another, whatever the method; rows have different ones."""
    other = tiny(3.0, name="lexinvariant", embedding=DrawnEmbedding())
    items = WORKLOADS["kv"].items(source, setting, 2, 0)
    chosen = kvjax.methods.full() if method == "streaming" else kvjax.methods.parse(method)
    chosen = dataclasses.replace(chosen, prefill="streaming") if method == "streaming" else chosen
    both, alone = (Batch(other, setting, rows).start(chosen) for rows in (items, items[1:]))
    assert both.cache.draws is not None and alone.cache.draws is not None
    assert len(set(np.asarray(both.cache.draws).tolist())) == 2
    np.testing.assert_array_equal(both.cache.draws[1], alone.cache.draws[0])
    np.testing.assert_allclose(both.logits[1], alone.logits[0], atol=1e-5 * float(abs(both.logits).max()))


def test_a_model_without_keys_stands_beside_another_only() -> None:
    with pytest.raises(UsageError, match="beside"):
        plans([tiny(name="ffnified", attention=FFNified(), rope=None)], [], ["kv"], OPTIONS)


def test_models_that_cannot_be_compared_are_refused(model: LanguageModel) -> None:
    with pytest.raises(UsageError, match="same name"):
        plans([model, model], ["int8"], ["kv"], OPTIONS)
    words = types.SimpleNamespace(encode=lambda text: list(text.encode()))
    other = dataclasses.replace(model, name="other", tokenizer=words)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UsageError, match="another tokenizer"):
        plans([model, other], ["int8"], ["kv"], OPTIONS)
