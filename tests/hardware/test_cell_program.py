"""What is compiled for a cell and what is made of it, with the compiler of this machine's CPU in place of others."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from experiments.hardware_table import measure, program
from experiments.hardware_table.cell import Cell, cells, workload
from experiments.hardware_table.program import Program
from experiments.hardware_table.target import BY_NAME, Core, Target
from experiments.hardware_table.toolchain import Toolchain
from kvjax.errors import MissingExtraError, UsageError

STANDIN = "tests.hardware.standin.op:OPS"
CPU = Toolchain("cpu", "cpu", (), lambda folder, cycles: {}, lambda topology: jax.devices()[0], lambda folder: {})


@pytest.fixture(autouse=True)
def cpu(monkeypatch) -> None:
    monkeypatch.setitem(BY_NAME, "cpu", Target("cpu", "xla", "", CPU, Core(1.0, 100.0, "invented")))


def cell(spec: str, target: str = "cpu") -> Cell:
    return Cell("standin", spec, target, STANDIN)


def test_a_program_survives_its_way_into_another_process():
    for sent in (Program(cell("fine")), Program(cell("fine"), steps=8, copies=True)):
        assert Program.loads(sent.dumps()) == sent


def test_what_compiles_is_measured():
    found = program.result(Program(cell("fine")))
    assert found["status"] == "ok"
    assert found["array_bytes"] == 4096 * 128 + 4 * 128
    assert found["argument_bytes"] == found["array_bytes"]
    assert found["output_bytes"] == 4 * 128
    assert found["alias_bytes"] == 0


@pytest.mark.parametrize(
    ("spec", "status", "reason"),
    [
        ("declines", "unsupported", "this workload is declined"),
        ("fails", "failed", "TypeError: this workload fails"),
    ],
)
def test_declining_is_not_failing(spec, status, reason):
    found = program.result(Program(cell(spec)))
    assert found["status"] == status and found["reason"].startswith(reason)
    assert ("(op.py:" in found["reason"]) is (status == "failed")


def test_a_refusal_of_the_compiler_is_a_failure_and_not_a_decline(monkeypatch):
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("Unimplemented primitive")

    monkeypatch.setattr(jax.stages.Traced, "lower", refuse)
    assert program.result(Program(cell("fine")))["status"] == "failed"


def test_types_below_a_byte_count_by_their_bits():
    sizes = {"int4": 12, "uint2": 6, "int8": 24, "bool": 24, "bfloat16": 48, "float8_e4m3fn": 24, "float32": 96}
    for dtype, expected in sizes.items():
        assert program.size(jax.ShapeDtypeStruct((2, 12), jnp.dtype(dtype))) == expected


def test_donated_arguments_are_written_in_place(monkeypatch):
    def bump(x: jax.Array, *, bias: jax.Array, trouble: str) -> jax.Array:
        return x + 1

    load = workload(cell("fine"))
    monkeypatch.setattr(type(load.spec), "donated", (0,), raising=False)
    monkeypatch.setattr(type(load.op), "__call__", lambda op, *args, implementation, **kwargs: bump(*args, **kwargs))
    found = program.result(Program(cell("fine")))
    assert found["alias_bytes"] == 4096 * 128


def test_cells_are_workloads_times_targets_that_have_a_kernel():
    found = list(cells(registries=(STANDIN,)))
    assert {one.target for one in found} == {"v4", "v5e", "v5p", "v6e", "tpu7x", "h100", "cpu"}
    assert len(found) == len(set(found)) == 7 * 7
    some = cells(ops=("standin",), specs=("fine", "illegal"), targets=("v5e",), registries=(STANDIN,))
    assert [one.spec for one in some] == ["fine", "illegal"]


@pytest.mark.parametrize("wrong", [{"ops": ("standing",)}, {"specs": ("fien",)}, {"targets": ("v5",)}])
def test_an_unknown_name_is_told_the_nearest(wrong):
    with pytest.raises(UsageError, match=r"unknown .* Did you mean"):
        list(cells(**wrong, registries=(STANDIN,)))


def test_the_registry_of_the_package_has_names_that_do_not_repeat():
    found = list(cells())
    assert len({(one.op, one.spec, one.target) for one in found}) == len(found)


def canned(cycles_per_step: int, prologue: int, copies: int) -> Any:
    def compiled(one: Program, limit: float) -> dict[str, Any]:
        if one.steps is None:
            return {"status": "ok", "bundles": 900}
        found = {"status": "ok", "packed_bytes": 4096, "slots": 16, "bundles": 500 + copies * one.copies}
        return found if one.copies else found | {"cycles": prologue + cycles_per_step * one.steps}

    return compiled


def test_cycles_of_a_block_are_free_of_prologue_and_epilogue(monkeypatch):
    monkeypatch.setattr(measure, "compiled", canned(cycles_per_step=321, prologue=12345, copies=70))
    row = measure.row(cell("fine"), limit=1.0)
    block = {"packed_bytes": 4096, "slots": 16, "bundles": 500, "copy_bundles": 70}
    assert row["schedule"] == {**block, "cycles": 321}
    assert (row["op"], row["spec"], row["target"], row["bundles"]) == ("standin", "fine", "cpu", 900)


def test_a_schedule_that_cannot_be_had_says_why_and_leaves_the_row(monkeypatch):
    def compiled(one: Program, limit: float) -> dict[str, Any]:
        return {"status": "ok"} if one.steps is None else {"status": "failed", "reason": "killed by SIGABRT"}

    monkeypatch.setattr(measure, "compiled", compiled)
    row = measure.row(cell("fine"), limit=1.0)
    assert row["status"] == "ok" and row["schedule"] == {"reason": "killed by SIGABRT"}


def test_an_estimate_that_kills_the_compiler_leaves_the_rest(monkeypatch):
    whole = canned(cycles_per_step=321, prologue=0, copies=70)

    def compiled(one: Program, limit: float) -> dict[str, Any]:
        found = whole(one, limit)
        return {"status": "failed", "reason": "died", "bundles": 500} if "cycles" in found else found

    monkeypatch.setattr(measure, "compiled", compiled)
    block = {"packed_bytes": 4096, "slots": 16, "bundles": 500, "copy_bundles": 70}
    assert measure.row(cell("fine"), limit=1.0)["schedule"] == {**block, "reason": "died"}


def test_rows_come_in_order_and_a_death_stops_nothing():
    """Through real processes; without libtpu they all end with an error of their own."""
    chosen = [cell("aborts", "v5e"), cell("declines", "v5e")]
    rows = list(measure.rows(chosen, workers=2, limit=60.0))
    assert [row["spec"] for row in rows] == ["aborts", "declines"]
    assert rows[0]["status"] == "failed"


def test_a_compiler_that_is_missing_is_named_with_the_way_to_get_it():
    missing = Toolchain("tpu", "tpu", ("no-such-compiler",), CPU.variables, CPU.device, CPU.code)
    assert not missing.installed
    with pytest.raises(MissingExtraError, match=r"no-such-compiler .*`make test-hardware`"):
        missing.versions()
