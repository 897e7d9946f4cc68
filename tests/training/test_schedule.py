from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from kvjax.training.loop import Progress
from kvjax.training.schedule import CURRICULUM, TASKS, Gate, LearningRate, Stage


def test_learning_rate():
    rate = LearningRate(peak=2.0, warmup=4, decay_from=10, steps=20, floor=0.1)
    assert [float(rate(s)) for s in range(4)] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert float(rate(10)) == pytest.approx(2.0)
    assert float(rate(15)) == pytest.approx(2.0 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 2))), rel=1e-6)
    assert float(rate(20)) == float(rate(10_000)) == pytest.approx(0.2)


def test_stages_get_harder_and_end_at_the_full_context():
    """But for the one that goes back to short contexts, each stage is at least as hard as the one before."""
    *rising, back, last = CURRICULUM
    for one, two in itertools.pairwise([*rising, last]):
        assert two.length >= one.length and two.pairs >= one.pairs and two.repeat <= one.repeat
    assert back.length < last.length == max(stage.length for stage in CURRICULUM)
    for stage in CURRICULUM:
        assert stage.repeat + stage.text <= 1 and len(stage.shares) == len(TASKS)
        assert sum(stage.shares) == pytest.approx(1)


def test_the_gate_opens_on_the_mean_of_a_full_window():
    gate = Gate(accuracy=0.9, window=3)
    stages = [Stage(64, 4, 0.0, 0.0, 0.0, 0.0), Stage(64, 4, 0.0, 0.0, 0.0, 0.0)]
    progress = Progress(0, 0, (), 0)
    for accuracy in (1.0, float("nan"), 0.9):
        progress = progress.advance(accuracy, gate, stages)
    assert progress == Progress(3, 0, (1.0, 0.9), 0)
    progress = progress.advance(0.95, gate, stages)
    assert progress == Progress(4, 1, (), 4)
    for _ in range(5):
        progress = progress.advance(1.0, gate, stages)
    assert progress == Progress(9, 1, (1.0, 1.0, 1.0), 4)
    assert np.isfinite(progress.recent).all()


def test_a_stage_lasts_as_long_as_it_says():
    stages = [Stage(64, 4, 0.0, 0.0, 0.0, 0.0), Stage(64, 4, 0.0, 0.0, 0.0, 0.0, least=5)] * 2
    progress = Progress(2, 0, (), 0)
    entered = []
    for _ in range(9):
        progress = progress.advance(1.0, Gate(accuracy=0.9, window=1), stages)
        entered.append(progress.stage)
    assert entered == [1, 1, 1, 1, 1, 2, 3, 3, 3]
