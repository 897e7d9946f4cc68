"""A calibrated method stands wherever a method does: as a value, as a file, for its own model only."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy

import kvjax
from kvjax.cache.budget import HeadTable, Uniform
from kvjax.cache.layer_cache import LayerData
from kvjax.cache.methods import parse
from kvjax.calibration.observe import model_dims
from kvjax.engine.calibrated import Calibrated, weights_digest
from kvjax.errors import CorruptDataError, UsageError
from kvjax.evaluation.batch import Batch, feed
from kvjax.evaluation.contender import contenders
from kvjax.evaluation.plan import Options, Plan
from kvjax.evaluation.setting import Setting
from kvjax.evaluation.workload import WORKLOADS, Source
from kvjax.models.language_model import LanguageModel
from tests.cache.calibrated import data_of
from tests.calibration.conftest import build
from tests.engine.driver import compilations

PROMPTS = [[5, 9, 300, 41, 7, 500, 33, 2, 91], [8, 77, 12, 400, 9, 31]]


def made(model: LanguageModel, spec: str, factor: float = 1.0) -> Calibrated:
    """A method with random data of the right shapes."""
    method = parse(spec)
    layers = [data_of(method, dims) for dims in model_dims(model, 64)]
    scaled = [LayerData(*jax.tree.map(lambda x: x * np.float32(factor), (d.keys, d.values, d.policy))) for d in layers]
    return Calibrated(method, tuple(scaled), weights_digest(model), ("drawn at random",))


@pytest.fixture
def path(model, tmp_path) -> Path:
    target = tmp_path / "kvquant.safetensors"
    made(model, "kvquant-4").save(target)
    return target


def generate(model: LanguageModel, method: object) -> list[list[int]]:
    return kvjax.generate(model, PROMPTS, method, max_new_tokens=6, stop=(), dtype="float32").tokens  # type: ignore[arg-type]


@pytest.mark.parametrize("spec", ["kvquant-4", "cskv", "kvzap:tokens=64,recent=4,hidden=8", "razor:local=8"])
def test_a_file_gives_it_back_bit_for_bit(model, spec, tmp_path):
    before = made(model, spec)
    before.save(tmp_path / "a.safetensors")
    after = kvjax.load_calibration(tmp_path / "a.safetensors")
    assert (after.method, after.model_digest, after.notes) == (before.method, before.model_digest, before.notes)
    assert jax.tree.structure(after.layers) == jax.tree.structure(before.layers)
    for old, new in zip(jax.tree.leaves(before.layers), jax.tree.leaves(after.layers), strict=True):
        assert old.dtype == new.dtype and old.tobytes() == new.tobytes()
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"], "nothing is left beside it"


def test_the_value_and_its_file_are_methods(model, path):
    said = [generate(model, method) for method in (made(model, "kvquant-4"), str(path))]
    assert said[0] == said[1]
    assert said[0] != generate(model, made(model, "kvquant-4", factor=0.1)), "what was learnt matters"


def test_what_was_learnt_is_an_argument_of_the_program_and_stays_whole(model):
    """Other data compile nothing anew; caches, which steps consume, hold copies."""
    first = made(model, "kvquant-4")
    before = generate(model, first)
    with compilations() as seen:
        generate(model, made(model, "kvquant-4", factor=0.5))
        assert generate(model, first) == before
    assert seen == []


@pytest.mark.parametrize("prefill", ["exact", "streaming"])
def test_heads_whose_caches_are_apart_share_what_was_learnt(model, prefill):
    """Steps take over the buffers of all caches, so none may be in two of them."""
    one = made(model, "kvzap:tokens=16,recent=4,hidden=8")
    table = HeadTable(budgets=(Uniform(tokens_kept=16), Uniform(tokens_kept=8)), table=((0, 1), (1, 0)))
    one = dataclasses.replace(one, method=dataclasses.replace(one.method, budget=table, prefill=prefill))
    assert all(len(row) == 6 for row in generate(model, one))


@pytest.mark.parametrize("use", [generate, lambda model, method: Plan.make(model, [method], ["kv"], Options(128))])
def test_other_weights_are_refused(path, use):
    with pytest.raises(UsageError, match="calibrated to other weights"):
        use(build(1), str(path))


@pytest.mark.parametrize("use", [generate, lambda model, method: Plan.make(model, [method], ["kv"], Options(128))])
def test_a_method_that_was_not_calibrated_says_what_to_do(model, use):
    with pytest.raises(UsageError, match="kvjax calibrate --method kvquant-3"):
        use(model, "kvquant-3")


def test_the_digest_is_that_of_the_weights(model):
    again = dataclasses.replace(model, params=jax.tree.map(lambda x: x + 0, model.params), name="renamed")
    assert weights_digest(again) == weights_digest(model)
    first, *rest = jax.tree.leaves(model.params)
    nudged = first.at[(0,) * first.ndim].add(1e-3)
    other = dataclasses.replace(model, params=jax.tree.unflatten(jax.tree.structure(model.params), [nudged, *rest]))
    assert weights_digest(other) != weights_digest(model)


def test_damage_is_found(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptDataError, match="damaged"):
        kvjax.load_calibration(path)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(CorruptDataError, match="no safetensors file"):
        kvjax.load_calibration(path)


def test_other_files_are_neither_read_nor_replaced(model, tmp_path):
    other = tmp_path / "model.safetensors"
    safetensors.numpy.save_file({"x": np.zeros(2)}, other)
    with pytest.raises(UsageError, match="no calibration"):
        kvjax.load_calibration(other)
    with pytest.raises(UsageError, match="left alone"):
        made(model, "kvquant-4").save(other)
    with pytest.raises(UsageError, match=r"ends with \.safetensors"):
        made(model, "kvquant-4").save(tmp_path / "x.json")
    with pytest.raises(UsageError, match="there is no file"):
        generate(model, str(tmp_path / "missing.safetensors"))


def test_a_file_of_a_later_version_is_named(path, monkeypatch):
    monkeypatch.setattr("kvjax.engine.calibrated.VERSION", "2")
    with pytest.raises(UsageError, match="reads version 2"):
        kvjax.load_calibration(path)


def test_contenders(model, path):
    (full, *_), named = contenders([]), contenders([str(path)])[-1]
    assert full.calibrated is None
    assert named.name == "kvquant-4" and named.own_budget and named.calibrated is not None
    with pytest.raises(UsageError, match="two different methods"):
        contenders([str(path), made(model, "kvquant-4", factor=0.5)])
    json.dumps(Plan.make(model, [str(path)], ["kv"], Options(context=128)).config)


@pytest.mark.parametrize("task", ["perplexity-prefill", "perplexity-stream"])
def test_a_comparison_measures_what_the_engine_gives(model, task):
    """A batch's cache of a calibrated method predicts what a prefilled context predicts, twice in a row."""
    one, setting = made(model, "kvquant-4"), Setting(context=128, room=32, batch=1)
    batch = Batch(model, setting, WORKLOADS[task].items(Source(model), setting, 1, 0), {one.method.name: one})
    piece = batch.pieces()[0]
    first, again = (np.asarray(feed(model, batch.start(one.method), piece)[1]) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert np.isfinite(first).all()
    if task == "perplexity-prefill":
        prompt = batch.items[0].prompt.tolist()
        context = kvjax.prefill(model, [prompt], one, reserve=setting.room)
        np.testing.assert_allclose(feed(model, context, piece)[1], first, atol=1e-4)
