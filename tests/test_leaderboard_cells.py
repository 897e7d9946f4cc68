"""Which setting of a method stands at which size of the leaderboard."""

from __future__ import annotations

import dataclasses
import math
import re

import pytest

from experiments.board import cells
from experiments.board.cells import Entrant
from kvjax.cache import methods
from kvjax.cache.budget import Full, HeadTable, Uniform
from kvjax.cache.layer_cache import LayerData
from kvjax.cache.layout import CacheDims
from kvjax.engine.calibrated import Calibrated

DIMS = tuple(
    CacheDims(1, 2, 4, 32, max_length=1024, prompt_length=992, dtype="bfloat16", layer=layer, layers=2)
    for layer in range(2)
)
TOKEN = 1 / 1024
"""A token's keys and values, as a share of the full cache."""


def entrant(name: str) -> Entrant:
    return Entrant(name, {s: methods.parse(s) for s in cells.SETTINGS.get(name, (name,))})


@pytest.mark.parametrize("name", ["random", "snapkv", "pyramidkv", "h2o", "kvcrush"])
def test_an_evicting_method_gets_the_largest_budget_that_fits(name):
    for size, cell in zip((0.5, 0.25), cells.cells(entrant(name), DIMS, (0.5, 0.25)), strict=True):
        assert (cell.size, cell.kind, cell.fits) == (size, "evicts", True)
        assert size - 2 * TOKEN < cell.share <= size
        again = methods.parse(cell.setting)
        assert again.budget.bytes_kept == int(size * 2 * 4 * 2 * 32 * 1024), "the name says how to run it again"


def test_a_size_below_what_is_always_kept_is_marked_with_the_reason():
    (cell,) = cells.cells(entrant("snapkv"), DIMS, (1 / 16,))
    assert cell.contender is None and not cell.setting
    assert cell.reason == "even its smallest budget takes more than 32 KiB"


@pytest.mark.parametrize("name", ["int8", "int4", "int2", "kivi-4", "turboquant-3", "polarquant", "kvtuner"])
def test_a_setting_of_fixed_bytes_stands_at_the_nearest_size_and_once(name):
    found = cells.cells(entrant(name), DIMS, cells_sizes := (0.5, 0.25, 0.125, 0.0625))
    assert [cell.size for cell in found] == list(cells_sizes), "none is elsewhere"
    reached = [cell for cell in found if cell.contender is not None]
    assert reached and len({cell.setting for cell in reached}) == len(reached)
    for cell in reached:
        assert abs(math.log2(cell.share / cell.size)) <= 0.5
        assert cell.fits == (cell.share <= 1.02 * cell.size)
    assert all("its settings take" in cell.reason for cell in found if cell.contender is None)


def test_what_is_near_no_size_of_the_board_appears_besides():
    assert [(cell.size, bool(cell.setting)) for cell in cells.cells(entrant("int8"), DIMS, (0.25,))] == [
        (0.25, False),
        (None, True),
    ]
    quest = cells.cells(entrant("quest"), DIMS, (0.5,))[-1]
    assert (quest.kind, quest.size) == ("whole", None) and quest.share > 1


def test_a_table_of_heads_gets_the_largest_window_that_fits():
    budget = HeadTable((Full(), Uniform(tokens_kept=8)), table=((0, 1),))
    method = dataclasses.replace(methods.parse("duo_attention"), budget=budget, sinks=4, recent=4)
    made = Calibrated(method, (LayerData(), LayerData()), "digest")
    half, more = cells.cells(Entrant("duo", {"duo": made}), DIMS, (0.5, 0.75))
    assert half.contender is None and "window of one token" in half.reason, "full heads alone take half"
    assert isinstance(more.contender, Calibrated) and more.contender.model_digest == "digest"
    recent = more.contender.method.recent
    assert more.setting == f"duo:recent={recent}" == more.contender.method.name
    assert more.contender.method.budget.budgets[1].tokens_kept == 4 + recent
    assert 0.75 - 2 * TOKEN < more.share <= 0.75


def test_a_combination_gets_its_bytes_where_it_evicts():
    (cell,) = cells.cells(entrant("int4+snapkv"), DIMS, (0.25,))
    assert cell.kind == "both" and re.fullmatch(r"int4\+snapkv:bytes=\d+", cell.setting)
    assert 0.25 - TOKEN < cell.share <= 0.25


def test_what_a_method_has_learnt_is_shared_by_the_rows_that_are_measured():
    one, *_ = cells.cells(entrant("kvquant-2"), DIMS, (0.25,))
    many, *_ = cells.cells(entrant("kvquant-2"), [dataclasses.replace(layer, batch=16) for layer in DIMS], (0.25,))
    assert 0 < many.share < one.share
