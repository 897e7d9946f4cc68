"""Kernels compiled for chips that are not here: the harness on its stand-in, and a sample of the committed table.

Needs the compilers of .venv-hardware; `make test-hardware` runs it there.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from experiments.compile_kernels import require_same_versions
from experiments.hardware_table import golden, measure
from experiments.hardware_table.cell import Cell, cells
from experiments.hardware_table.target import BY_NAME
from kvjax.errors import KvjaxError

if not any(target.toolchain.installed for target in BY_NAME.values()):
    pytest.skip("no compiler for a TPU or a GPU here; make test-hardware has them", allow_module_level=True)

LIMIT = 300.0
COMMITTED = golden.load()


def compiler(target: str) -> None:
    """Skips the test unless kernels can be compiled for `target` here."""
    try:
        BY_NAME[target].toolchain.versions()
    except KvjaxError as error:
        pytest.skip(str(error))


def standin(spec: str, target: str) -> Cell:
    return Cell("standin", spec, target, "tests.hardware.standin.op:OPS")


def row(spec: str, target: str) -> dict[str, Any]:
    compiler(target)
    return measure.row(standin(spec, target), LIMIT)


def test_a_kernel_for_a_tpu_is_measured():
    found = row("fine", "v5e")
    assert found["status"] == "ok"
    assert found["array_bytes"] == found["argument_bytes"] == 4096 * 128 + 4 * 128
    assert found["bundles"] > 0 and found["spills"] == found["fills"] == 0
    schedule = found["schedule"]
    assert (schedule["packed_bytes"], schedule["slots"]) == (512 * 128, 512)
    # 512 rows of 128 bytes are 16 registers of int8; widening and adding them takes more cycles than loading them.
    assert 16 < schedule["cycles"] < 1000
    assert 0 < schedule["copy_bundles"] < 500


def test_a_kernel_for_a_gpu_is_measured():
    found = row("fine", "h100")
    assert found["status"] == "ok" and 0 < found["registers"] <= 255
    assert (found["spill_bytes"], found["bulk_copies"], found["barriers"]) == (0, 1, 1)
    # What the kernel hands to XLA is an array of its own, and seen.
    assert found["intermediate_bytes"] == 4 * 4096 * 128


def test_a_schedule_that_is_declined_leaves_the_kernel():
    found = row("unscheduled", "v6e")
    assert found["status"] == "ok" and found["schedule"] == {"reason": "this workload has no schedule"}


@pytest.mark.parametrize("target", ["v4", "v5e", "v5p", "v6e", "tpu7x"])
def test_a_kernel_is_traced_for_the_chip_it_is_compiled_for(target):
    assert row("knows_the_chip", target)["reason"] == f"traced for {target.removeprefix('tpu')}"


def test_what_only_the_compiler_refuses_is_a_failure_with_its_words():
    found = row("illegal", "v5e")
    assert found["status"] == "failed" and "failed to legalize operation" in found["reason"]


@pytest.mark.parametrize("target", ["v5e", "h100"])
def test_a_process_that_dies_is_a_failed_row(target):
    assert row("aborts", target) == {
        "op": "standin",
        "spec": "aborts",
        "target": target,
        "status": "failed",
        "reason": "killed by SIGABRT",
    }


SAMPLED = ("v5e", "tpu7x", "h100")
IN_TABLE = [cell for cell in cells(targets=SAMPLED) if (cell.op, cell.spec, cell.target) in COMMITTED.rows]
SAMPLE = tuple({(cell.op, cell.target): cell for cell in reversed(IN_TABLE)}.values())
"""The first workload of every op on three targets."""


@pytest.fixture(scope="module")
def rows() -> Iterator[dict[Cell, Future[dict[str, Any]]]]:
    """The rows of the sample, two at a time while the first tests look at theirs."""
    with ThreadPoolExecutor(2) as pool:
        here = [cell for cell in SAMPLE if BY_NAME[cell.target].toolchain.installed]
        yield {cell: pool.submit(measure.row, cell, LIMIT) for cell in here}


@pytest.mark.parametrize("cell", SAMPLE, ids=lambda cell: f"{cell.op}-{cell.spec}-{cell.target}")
def test_a_sample_is_what_the_committed_table_says(cell, rows):
    compiler(cell.target)
    toolchain = BY_NAME[cell.target].toolchain
    found = rows[cell].result()
    assert found["status"] != "failed", found["reason"]
    try:
        require_same_versions(COMMITTED, {toolchain.name: toolchain.versions()})
    except KvjaxError as error:
        pytest.skip(f"compiled, not compared: {error}")
    assert list(golden.differences(COMMITTED, [found])) == []
