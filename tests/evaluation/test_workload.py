from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from kvjax.assets import heldout_text
from kvjax.errors import UsageError
from kvjax.evaluation.setting import Setting
from kvjax.evaluation.workload import WORKLOADS, expand, room
from kvjax.tasks import TASKS, examples

LONG = Setting(context=256, room=32, batch=2)


@pytest.mark.parametrize("task", sorted(TASKS))
def test_recall_prompts_have_one_length_and_answers_follow_the_question(source, task):
    for item in WORKLOADS[task].items(source, LONG, 3, seed=0):
        assert len(item.prompt) == LONG.prompt
        assert len(item.follow) <= LONG.room
        assert item.follow[: len(source.vocabulary.ask)].tolist() == source.vocabulary.ask.tolist()
        assert 1 <= item.graded < len(item.follow)


@pytest.mark.parametrize("task", ["needle", "kv3"])
def test_query_aware_items_end_with_the_question(source, task):
    aware = dataclasses.replace(LONG, query_aware=True)
    for item in WORKLOADS[task].items(source, aware, 3, seed=0):
        assert len(item.prompt) == LONG.prompt
        # The question's last token is shown and then fed, so that no answer comes from the exact prefill.
        assert item.unread == 1 and len(item.follow) == item.graded + 1
        assert item.follow[0] == item.prompt[-1]
        asked = len(source.vocabulary.ask) + {"needle": 1, "kv3": 3}[task]
        key = item.prompt[-asked:][len(source.vocabulary.ask) :]
        body = item.prompt[:-asked]
        places = [i for i in range(len(body)) if np.array_equal(body[i : i + len(key)], key)]
        assert len(places) == 1
        start = places[0] + len(key)
        np.testing.assert_array_equal(body[start : start + item.graded], item.follow[1:])


def test_both_perplexity_protocols_read_the_same_windows(source):
    prefill, stream = (WORKLOADS[f"perplexity-{p}"].items(source, LONG, 4, seed=3) for p in ("prefill", "stream"))
    text = heldout_text()
    for a, b in zip(prefill, stream, strict=True):
        np.testing.assert_array_equal(np.concatenate([a.prompt, a.follow]), b.follow)
        assert (len(a.prompt), a.graded, len(b.prompt)) == (LONG.prompt, LONG.room, 0)
        assert b.graded == LONG.context - 1
        graded = source.backend.decode(b.follow[-b.graded :].tolist())
        assert graded in text and b.text_bytes == len(graded.encode())
        assert a.text_bytes == len(source.backend.decode(a.follow.tolist()).encode())


@pytest.mark.parametrize("task", ["kv", "perplexity-prefill"])
def test_items_depend_on_the_seed_and_their_number_alone(source, task):
    few, many, other = (WORKLOADS[task].items(source, LONG, n, seed) for n, seed in ((2, 0), (5, 0), (2, 1)))
    for a, b in zip(few, many, strict=False):
        np.testing.assert_array_equal(a.prompt, b.prompt)
    assert not np.array_equal(few[0].prompt, other[0].prompt)
    assert not np.array_equal(few[0].prompt, few[1].prompt)


def test_the_room_holds_every_task(source):
    assert room(source.vocabulary) % 32 == 0
    assert all(task.turn_size(source.vocabulary) <= room(source.vocabulary) for task in TASKS.values())


def test_recall_items_are_those_of_the_task(source):
    turn = TASKS["vt"].turn_size(source.vocabulary)
    made = examples("vt", source.vocabulary, source.text, length=LONG.prompt + turn, count=2, seed=5)
    for item, example in zip(WORKLOADS["vt"].items(source, LONG, 2, seed=5), made, strict=True):
        np.testing.assert_array_equal(item.prompt, example.context)
        np.testing.assert_array_equal(item.follow, np.concatenate([example.question, example.answer]))


def test_one_name_stands_for_both_protocols():
    assert expand(["perplexity", "kv", "perplexity-stream"]) == ["perplexity-prefill", "perplexity-stream", "kv"]


@pytest.mark.parametrize(("name", "near"), [("nedle", "needle"), ("perplexty", "perplexity")])
def test_unknown_tasks_name_the_nearest(name, near):
    with pytest.raises(UsageError, match=f"unknown task '{name}'.*{near}"):
        expand([name])


def test_a_task_that_does_not_fit_says_how_long_a_context_must_be(source):
    with pytest.raises(UsageError, match="needs at least"):
        WORKLOADS["kv3"].items(source, Setting(context=96, room=32, batch=1), 1, 0)
