"""One recorded prompt serves every method, and one recorded decode measures every method's attention output."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from kvjax.cache import methods
from kvjax.cache.plan import resolve
from kvjax.engine.prefill import prefill as engine_prefill
from kvjax.evaluation import program
from kvjax.evaluation.batch import Batch, feed
from kvjax.evaluation.workload import WORKLOADS, Item

SPECS = ["full", "random:tokens=40", "h2o:tokens=40", "kivi-2:residual=32"]


def ragged(model, setting, source) -> Batch:
    items = WORKLOADS["kv"].items(source, setting, 2, seed=0)
    return Batch(model, setting, [items[0], Item(items[1].prompt[:70], items[1].follow, items[1].graded)])


@pytest.mark.parametrize("spec", [*SPECS, "kvzip:tokens=40,together=false"])
def test_a_recorded_prompt_is_the_prefill_of_every_method(model, setting, source, spec):
    batch = ragged(model, setting, source)
    method = resolve(methods.parse(spec), setting.dims(model))
    prompts = [item.prompt.tolist() for item in batch.items]
    alone = engine_prefill(model, prompts, method, reserve=setting.room, dtype=setting.dtype, length=setting.prompt)
    shared = batch.start(method)
    assert jax.tree.structure(shared.cache) == jax.tree.structure(alone.cache)
    np.testing.assert_allclose(shared.logits, alone.logits, atol=1e-4)
    for ours, theirs in zip(shared.cache, alone.cache, strict=True):
        np.testing.assert_array_equal(ours.length, theirs.length)
        np.testing.assert_array_equal(ours.limit, theirs.limit)
        np.testing.assert_array_equal(ours.head_index, theirs.head_index)
        for a, b in zip(ours.segments, theirs.segments, strict=True):
            np.testing.assert_array_equal(a.positions, b.positions)
            np.testing.assert_allclose(a.key_codec.decode(a.keys), b.key_codec.decode(b.keys), atol=2e-2)


def errors(model, setting, source, spec: str) -> np.ndarray:
    batch = ragged(model, setting, source)
    full, other = (resolve(methods.parse(s), setting.dims(model)) for s in ("full", spec))
    piece = batch.pieces()[0]
    reference = batch.start(full)
    recorded = program.record_steps(model.module, model.params, reference.cache, piece.tokens, piece.fed, piece.steps)
    return np.asarray(program.attention_errors(batch.start(other).cache, recorded, piece.steps))


def test_the_full_cache_has_no_attention_error(model, setting, source):
    assert errors(model, setting, source, "full").max() < 1e-6


def test_attention_errors_order_the_bit_widths(model, setting, source):
    by_bits = [errors(model, setting, source, f"int{bits}") for bits in (8, 4, 2)]
    assert len(by_bits[0]) == model.config.num_layers
    assert 0 < by_bits[0].max() < 0.03
    assert (by_bits[0] < by_bits[1]).all() and (by_bits[1] < by_bits[2]).all()
    assert by_bits[2].min() > 0.05


def test_attention_errors_are_those_of_two_separate_decodes(model, setting, source):
    """The first layer's inputs do not depend on the cache, so its outputs can be compared between two whole runs."""
    batch = ragged(model, setting, source)
    piece, outputs = batch.pieces()[0], {}
    for spec in ("full", "int2"):
        cache = batch.start(resolve(methods.parse(spec), setting.dims(model))).cache
        recorded = program.record_steps(model.module, model.params, cache, piece.tokens, piece.fed, piece.steps)
        outputs[spec] = np.stack([np.asarray(recorded[0].seen.output)[i, piece.fed > i] for i in range(piece.steps)])
    expected = np.linalg.norm(outputs["int2"] - outputs["full"]) / np.linalg.norm(outputs["full"])
    np.testing.assert_allclose(errors(model, setting, source, "int2")[0], expected, rtol=1e-4)


def test_grading_agrees_with_a_direct_formula():
    rng = np.random.default_rng(0)
    predicted, reference = rng.normal(size=(2, 2, 6, 9)).astype(np.float32) * 3
    tokens = rng.integers(0, 9, (2, 5)).astype(np.int32)
    graded = rng.random((2, 5)) < 0.6
    surprisal, divergence = map(np.asarray, program.grade(predicted, reference, tokens, graded))
    np.testing.assert_array_equal(program.said(predicted), np.argmax(predicted[:, :-1], axis=-1))
    for row, place in np.ndindex(2, 5):
        p, q = (np.exp(x[row, place].astype(np.float64)) for x in (reference, predicted))
        p, q = p / p.sum(), q / q.sum()
        wanted = (-np.log(q[tokens[row, place]]), np.sum(p * np.log(p / q))) if graded[row, place] else (0.0, 0.0)
        np.testing.assert_allclose((surprisal[row, place], divergence[row, place]), wanted, rtol=1e-4, atol=1e-6)


def test_feeding_in_pieces_is_feeding_at_once(model, setting, source):
    """A streamed text is cut into pieces that share one program; the cut must not show."""
    setting = dataclasses.replace(setting, dtype="float32")
    batch = Batch(model, setting, WORKLOADS["perplexity-stream"].items(source, setting, 2, seed=0))
    full = resolve(methods.full(), setting.dims(model))
    context, seen = batch.start(full), []
    for piece in batch.pieces():
        context, predicted = feed(model, context, piece)
        seen.append(np.asarray(predicted)[:, : setting.room])
    tokens = np.stack([item.follow for item in batch.items])
    expected = np.asarray(model.apply(tokens)[0])
    np.testing.assert_allclose(np.concatenate(seen, axis=1)[:, 1:], expected[:, :-1], atol=2e-4)
