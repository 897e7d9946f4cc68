"""Methods that have the model repeat the prompts, in a comparison: one pass for all, paid for by each, no question."""

from __future__ import annotations

import numpy as np
import pytest

from kvjax.cache.methods import parse
from kvjax.cache.policy import Repetition
from kvjax.cache.pool import Pool
from kvjax.evaluation import batch as batches
from kvjax.evaluation import profile
from kvjax.evaluation.batch import Batch, can_stream
from kvjax.evaluation.compare import compare
from kvjax.evaluation.setting import Setting
from kvjax.evaluation.workload import WORKLOADS, Source
from kvjax.models.language_model import LanguageModel

NAME = "kvzip:share=50%,chunk=64"


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[Repetition]:
    """What the model has been asked to repeat, in order."""
    asked: list[Repetition] = []

    def counted(*arguments):
        asked.append(arguments[4])
        return repeat(*arguments)

    repeat = batches.repeat
    monkeypatch.setattr(batches, "repeat", counted)
    return asked


def batch_of(model: LanguageModel) -> Batch:
    setting = Setting(context=128, room=32, batch=2)
    return Batch(model, setting, WORKLOADS["kv"].items(Source(model), setting, 2, seed=0))


def test_methods_that_ask_for_the_same_share_one_pass(model, passes) -> None:
    batch = batch_of(model)
    batch.start(parse("full"))
    assert passes == []
    for name in (NAME, f"{NAME},together=false"):
        batch.start(parse(name))
    assert passes == [Repetition(chunk=64)]
    batch.repeated(Repetition(chunk=32))
    assert passes == [Repetition(chunk=64), Repetition(chunk=32)]


def test_every_layer_keeps_the_tokens_with_the_largest_scores(model) -> None:
    """Of both heads together, whose numbers differ somewhere."""
    batch, counts = batch_of(model), []
    cache = batch.start(parse("kvzip:tokens=40,chunk=64,sinks=2")).cache
    for layer, received in zip(cache, batch.repeated(Repetition(chunk=64, sinks=2)), strict=True):
        (pool,), scores = [part for part in layer.segments if isinstance(part, Pool)], np.asarray(received)
        for row in range(2):
            owner, positions = np.asarray(pool.owner)[row], np.asarray(pool.positions)[row]
            kept = {(int(h), int(p)) for h, page in zip(owner, positions, strict=True) for p in page if p >= 0}
            length = int(batch.recorded[2][row])
            order = sorted(
                ((h, p) for h in range(2) for p in range(2, length - 1)), key=lambda at: -scores[row, at[0], at[1]]
            )
            assert kept == set(order[: 2 * 37])
            counts.append(sum(head == 0 for head, _ in kept))
    assert any(count != 37 for count in counts)


@pytest.mark.slow
def test_a_comparison_runs_it_without_the_question(model, passes, monkeypatch) -> None:
    monkeypatch.setattr(profile, "REPEATS", 2)
    found = compare(model, [NAME], ["kv"], context=128, seeds=1, examples=2, batch=2, progress=None)
    records = {record["method"]: record for record in found.records}
    ours, random = records[NAME], records["random"]
    assert 0 <= ours["score"] <= 1 and ours["kl"] > 0 and ours["attention_error"] > 0
    assert not ours["query_aware"] and ours["tokens_held"] == 48
    assert ours["prefill_ms"] > random["prefill_ms"], "the pass is part of what prefill costs"
    assert set(passes) == {Repetition(chunk=64)}


def test_no_text_can_be_streamed_through_it() -> None:
    assert can_stream(parse("random")) and not can_stream(parse(NAME))
