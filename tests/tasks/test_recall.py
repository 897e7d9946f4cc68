"""Every answer follows from the context alone, found here by solvers that know nothing of the generators."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from kvjax.errors import UsageError
from kvjax.tasks import TASKS, Chains, Copy, Example, ManyValues, Retrieval, Vocabulary, examples, recall, score

FRAME, ASK, BOS = 7, 8, 9
VOCABULARY = Vocabulary(
    size=500,
    prefix=np.asarray([BOS], np.int32),
    frame=np.asarray([FRAME], np.int32),
    ask=np.asarray([ASK], np.int32),
    keys=np.arange(100, 200, dtype=np.int32),
    values=np.arange(200, 300, dtype=np.int32),
)
#: Ordinary text of this vocabulary: it holds words of the tasks and line breaks, as real text does.
TEXT = np.random.default_rng(5).choice(np.r_[FRAME, 10:400], 20_000).astype(np.int32)
LENGTH = 320


def drawn(task, count=40, length=LENGTH, seed=0) -> list[Example]:
    return list(examples(task, VOCABULARY, TEXT, length=length, count=count, seed=seed))


def places(context: list[int], pattern: list[int]) -> list[int]:
    return [i for i in range(len(context)) if context[i : i + len(pattern)] == pattern]


def solve_retrieval(example: Example, task: Retrieval) -> list[int]:
    context, asked = example.context.tolist(), [i for i in example.question.tolist() if i != ASK]
    answer = []
    for i in range(0, len(asked), task.key_tokens):
        key = asked[i : i + task.key_tokens]
        (place,) = places(context, key)
        behind = place + task.key_tokens
        answer += key * (task.asked > 1) + context[behind : behind + task.value_tokens]
    return answer


def solve_many_values(example: Example, task: ManyValues) -> list[int]:
    context = example.context.tolist()
    return [token for i in places(context, [int(example.question[1])]) for token in context[i : i + 2]]


def solve_chains(example: Example, task: Chains) -> list[int]:
    """Follows the one record that a name begins; a name that begins none ends the chain."""
    context, name, answer = example.context.tolist(), int(example.question[1]), []
    while begun := places(context, [FRAME, name]):
        (place,) = begun
        name = context[place + 2]
        answer.append(name)
    return answer


def solve_copy(example: Example, task: Copy) -> list[int]:
    context, cue = example.context.tolist(), example.question.tolist()[1:]
    (place,) = places(context, cue)
    return context[place + len(cue) : place + len(cue) + task.answer]


SOLVERS = {Retrieval: solve_retrieval, ManyValues: solve_many_values, Chains: solve_chains, Copy: solve_copy}


@pytest.mark.parametrize("length", [LENGTH, 160])
@pytest.mark.parametrize("name", TASKS)
def test_answers_follow_from_the_context(name, length):
    task = TASKS[name]
    for example in drawn(name, length=length):
        assert SOLVERS[type(task)](example, task) == example.answer.tolist()


@pytest.mark.parametrize("name", TASKS)
def test_form(name):
    for example in drawn(name):
        assert len(example.context) + len(example.question) + len(example.answer) == LENGTH
        assert example.context[0] == BOS and example.question[0] == ASK
        assert sum(example.items) == len(example.answer)
        assert ASK not in example.context
        assert 0 <= example.depth < 1


@pytest.mark.parametrize("name", TASKS)
def test_an_example_depends_on_task_seed_and_index_alone(name):
    few, many, other = drawn(name, 3), drawn(name, 6), drawn(name, 3, seed=1)
    for one, two in zip(few, many, strict=False):
        assert np.array_equal(one.context, two.context) and np.array_equal(one.answer, two.answer)
    assert not any(np.array_equal(one.context, two.context) for one, two in zip(few, other, strict=True))
    assert len({example.context.tobytes() for example in many}) == 6


@pytest.mark.parametrize("name", ["needle", "kv", "copy"])
def test_places_are_uniform(name):
    depths = np.asarray([example.depth for example in drawn(name, 1500, length=200)])
    # A chi-square over deciles, 9 degrees of freedom: 27.9 is passed by chance once in a thousand. Depths of
    # long records cannot reach 1, so they are stretched to what they can reach.
    counts = np.histogram(depths / depths.max(), np.linspace(0, 1, 11))[0]
    assert np.sum((counts - 150.0) ** 2 / 150.0) < 27.9


def test_every_turn_of_a_scene_is_answered_by_its_context():
    rng = np.random.default_rng(0)
    for task in TASKS.values():
        scene = task.scene(rng, VOCABULARY, TEXT, 150, turns=task.questions)
        assert len(scene.turns) == task.questions
        assert len({turn.question.tobytes() for turn in scene.turns}) == task.questions
        assert np.array_equal(np.sort(scene.context[scene.filler])[[0]] >= 0, [True])
        assert scene.filler.sum() == 150
        for turn in scene.turns:
            example = Example("", scene.context, turn.question, turn.answer, turn.items, turn.depth)
            assert SOLVERS[type(task)](example, task) == turn.answer.tolist()
            assert len(turn.question) + len(turn.answer) == task.turn_size(VOCABULARY)


def test_filler_is_a_window_of_the_text_without_the_keys():
    scene = Retrieval(pairs=8).scene(np.random.default_rng(3), VOCABULARY, TEXT, 400)
    filler = scene.context[scene.filler]
    keys = scene.context[np.flatnonzero(~scene.filler)][2::3]
    assert len(keys) == 8 and not np.isin(filler, keys).any()
    kept = TEXT[~np.isin(TEXT, keys)]
    assert places(kept.tolist(), filler.tolist())


def test_crossed_keys_share_each_word_with_a_distractor():
    scene = Retrieval(pairs=4, key_tokens=2, crossed=True).scene(np.random.default_rng(0), VOCABULARY, TEXT, 0, turns=4)
    keys = np.stack([turn.question[1:] for turn in scene.turns])
    assert len(np.unique(keys[:, 0])) == 2 and len(np.unique(keys[:, 1])) == 2
    assert len(np.unique(keys, axis=0)) == 4


def test_score_and_recall():
    example = Example("x", TEXT[:5], TEXT[:2], np.asarray([1, 2, 3, 4]), (2, 2), 0.0)
    assert score(example, [1, 2, 3, 4, 99]) == 1.0 and recall(example, [1, 2, 3, 4, 99]) == 1.0
    assert score(example, [1, 9, 3, 4]) == 0.0 and recall(example, [1, 9, 3, 4]) == 0.5
    assert score(example, [1, 2]) == 0.0 and recall(example, [1, 2]) == 0.5
    assert score(example, []) == 0.0 and recall(example, []) == 0.0
    free = dataclasses.replace(example, ordered=False)
    assert score(free, [3, 4, 1, 2, 99]) == recall(free, [3, 4, 1, 2]) == 1.0
    assert recall(free, [3, 4, 3, 4]) == recall(free, [3, 4]) == 0.5
    assert score(free, [2, 3, 4, 1]) == recall(free, [2, 3, 4, 1]) == 0.0


def test_errors_say_what_to_do():
    with pytest.raises(UsageError, match=r"kv needs at least 52 tokens and the length is 40"):
        drawn("kv", length=40)
    with pytest.raises(UsageError, match=r"unknown task 'kw'. Did you mean 'kv'"):
        drawn("kw")
    with pytest.raises(UsageError, match=r"101 different keys or values of 1 words need more than the 100"):
        drawn(Retrieval(pairs=101), length=1000)
    with pytest.raises(UsageError, match="give a longer text"):
        list(examples("needle", VOCABULARY, TEXT[:0], length=64, count=1, seed=0))
