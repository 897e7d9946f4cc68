"""Scores against free-running decoding by the engine, which is never shown an answer."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import kvjax
from kvjax.cache import methods
from kvjax.cache.plan import resolve
from kvjax.engine.prefill import prefill as engine_prefill
from kvjax.evaluation import accuracy
from kvjax.evaluation.batch import Batch
from kvjax.evaluation.tally import Tally
from kvjax.evaluation.workload import WORKLOADS, Item
from kvjax.tasks import score

SPECS = ("full", "h2o:tokens=40")
TASKS = {"multivalue": False, "multiquery": True}


def decoded(model, setting, items, method) -> np.ndarray:
    """What the model says behind each question, int32 [rows, A], by `kvjax.generate` on a cache of the prompts.

    The question is appended token by token, as decoding does: a method that evicts does so after each token.
    """
    prompts = [item.prompt.tolist() for item in items]
    context = engine_prefill(model, prompts, method, reserve=setting.room, dtype=setting.dtype, length=setting.prompt)
    for tokens in np.stack([item.example.question for item in items]).T:
        context = kvjax.generate(model, [[int(t)] for t in tokens], cache=context, max_new_tokens=0).context
    said = kvjax.generate(model, [[]], cache=context, max_new_tokens=items[0].graded, stop=()).tokens
    return np.array(said, np.int32)


def asked(item: Item, answer: np.ndarray) -> Item:
    """The row with another answer."""
    example = dataclasses.replace(item.example, answer=answer)
    return dataclasses.replace(item, follow=np.concatenate([example.question, answer]), example=example)


def backwards(answer: np.ndarray, sizes: tuple[int, ...]) -> np.ndarray:
    """The answer's parts in reverse order."""
    return np.concatenate(np.split(answer, np.cumsum(sizes)[:-1])[::-1])


def spoilt(answer: np.ndarray, at: int) -> np.ndarray:
    """The answer with one wrong token."""
    return np.where(np.arange(len(answer)) == at, answer ^ 1, answer)


@pytest.mark.parametrize("spec", [pytest.param(SPECS[0], marks=pytest.mark.slow), *SPECS[1:]])
@pytest.mark.parametrize("task", TASKS)
def test_the_score_is_that_of_free_running_decoding(model, setting, source, task, spec):
    """Answers are made from what the engine says: as said, in another order, and with one wrong token."""
    method, full = (resolve(methods.parse(name), setting.dims(model)) for name in (spec, "full"))
    items = WORKLOADS[task].items(source, setting, 2, seed=1)
    said = decoded(model, setting, items, method)
    sizes = items[0].example.items

    def scores(answers: list[np.ndarray]) -> float:
        rows = [asked(item, answer) for item, answer in zip(items, answers, strict=True)]
        tally = Tally()
        list(accuracy.run(Batch(model, setting, rows), full, {spec: method}, {spec: tally}, errors=False))
        found = tally.results(scored=True)["score"]
        assert found == np.mean([score(row.example, tokens) for row, tokens in zip(rows, said, strict=True)])
        return found

    other = [backwards(answer, sizes) for answer in said]
    assert all(not np.array_equal(a, b) for a, b in zip(said, other, strict=True))
    assert scores([said[0], said[1]]) == 1.0
    assert scores(other) == (0.0 if TASKS[task] else 1.0)
    for at in (0, len(said[0]) - 1):
        assert scores([spoilt(other[0], at), other[1]]) == (0.0 if TASKS[task] else 0.5)
