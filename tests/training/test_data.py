"""Batches are a pure function of (seed, step, stage), and their masks mark what can be known."""

from __future__ import annotations

import dataclasses
import sys

import numpy as np
import pytest

from kvjax.tasks import Vocabulary
from kvjax.training.data import FAMILIES, Batch, Batches, reader
from kvjax.training.schedule import CURRICULUM, Stage

VOCABULARY = Vocabulary(
    size=500,
    prefix=np.asarray([1], np.int32),
    frame=np.asarray([7], np.int32),
    ask=np.asarray([3], np.int32),
    keys=np.arange(100, 200, dtype=np.int32),
    values=np.arange(200, 300, dtype=np.int32),
)
CORPUS = np.random.default_rng(5).integers(4, 500, 50_000).astype(np.uint16)
BATCHES = Batches(VOCABULARY, CORPUS, seed=3, batch_tokens=2048)


def same(one: Batch, two: Batch) -> bool:
    pairs = zip(dataclasses.astuple(one), dataclasses.astuple(two), strict=True)
    return all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("stage", CURRICULUM)
def test_form_of_every_stage(stage):
    for step in range(4):
        batch = BATCHES.batch(step, stage)
        rows, width = batch.tokens.shape
        assert rows * (width - 1) == 2048
        assert width - 1 in (stage.length, stage.length // 2, stage.length // 4, stage.length // 8)
        assert batch.tokens.dtype == np.int32 and batch.answer.dtype == batch.text.dtype == np.bool_
        assert batch.tokens.min() >= 0 and batch.tokens.max() < VOCABULARY.size
        assert (batch.tokens[:, 0] == 1).all()
        assert not (batch.answer & batch.text).any()
        recall = batch.family != FAMILIES.index("text")
        assert batch.answer[recall].any(1).all() and not batch.answer[~recall].any()


def test_pure_function_of_seed_and_step():
    stage = CURRICULUM[3]
    assert same(BATCHES.batch(5, stage), Batches(VOCABULARY, CORPUS, 3, 2048).batch(5, stage))
    assert not same(BATCHES.batch(5, stage), BATCHES.batch(6, stage))
    assert not same(BATCHES.batch(5, stage), Batches(VOCABULARY, CORPUS, 4, 2048).batch(5, stage))


def test_the_reader_gives_the_same_order_with_and_without_grain(monkeypatch):
    pytest.importorskip("grain")
    stage = CURRICULUM[1]
    expected = [BATCHES.batch(step, stage) for step in range(7, 12)]
    for installed in (True, False):
        if not installed:
            monkeypatch.setitem(sys.modules, "grain", None)
        source = reader(BATCHES, 7, stage)
        assert all(same(next(source), batch) for batch in expected)
        source.close()


def test_answers_of_repeats_were_seen_before():
    """In sequences of random tokens every answer follows a token that it has followed before."""
    only = Stage(128, 4, repeat=1.0, text=0.0, filler=0.0, tasks=0.0)
    seen = total = 0
    for step in range(5):
        batch = BATCHES.batch(step, only)
        for tokens, answer in zip(batch.tokens, batch.answer, strict=True):
            pairs: set[tuple[int, int]] = set()
            for i in range(1, len(tokens)):
                if answer[i]:
                    seen += (tokens[i - 1], tokens[i]) in pairs
                    total += 1
                pairs.add((tokens[i - 1], tokens[i]))
    # The one exception is where a periodic row first closes its circle: once per row.
    assert total > 2000 and seen >= total - 5 * 16


def test_text_rows_are_windows_of_the_corpus():
    batch = BATCHES.batch(0, Stage(64, 4, repeat=0.0, text=1.0, filler=0.0, tasks=0.0))
    whole = CORPUS.astype(np.int32)
    for tokens, text in zip(batch.tokens, batch.text, strict=True):
        assert text[1:].all() and not text[0]
        places = np.flatnonzero(whole == tokens[1])
        assert any(np.array_equal(whole[p : p + 64], tokens[1:]) for p in places)


def test_filled_scenes_use_their_whole_length():
    stage = Stage(512, 16, repeat=0.0, text=0.0, filler=1.0, tasks=0.5)
    batch = BATCHES.batch(0, stage)
    assert (batch.text.sum(1) > 300).all()
    assert (batch.tokens[:, -1] != 0).all() and batch.answer[:, -1].all()
