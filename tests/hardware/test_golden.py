"""The committed table: how a new one is compared with it, and what is committed."""

from __future__ import annotations

from typing import Any

import pytest

from experiments import compile_kernels
from experiments.hardware_table import golden, report
from experiments.hardware_table.golden import Golden
from experiments.hardware_table.target import BY_NAME
from kvjax.errors import CorruptDataError, UsageError

LIBTPU = {"tpu": {"jax": "0.10.2", "jaxlib": "0.10.2", "libtpu": "0.0.42.1"}}
NEWER = {"tpu": {**LIBTPU["tpu"], "libtpu": "0.0.50"}}
FINE = {
    "op": "decode",
    "spec": "int8",
    "target": "v5e",
    "status": "ok",
    "array_bytes": 1000,
    "argument_bytes": 1024,
    "temporary_bytes": 10,
    "alias_bytes": 0,
    "output_bytes": 4,
    "intermediate_bytes": 8,
    "moved_bytes": 0,
    "bundles": 1000,
    "spills": 3,
    "fills": 4,
    "schedule": {"packed_bytes": 819_000, "slots": 2048, "bundles": 500, "copy_bundles": 150, "cycles": 600},
}
DECLINED = {"op": "decode", "spec": "int2", "target": "v4", "status": "unsupported", "reason": "no two-bit | types"}
GRAPHICS = {**FINE, "target": "h100", "registers": 128, "spill_bytes": 0, "bulk_copies": 4, "barriers": 4}
del GRAPHICS["schedule"], GRAPHICS["bundles"], GRAPHICS["spills"], GRAPHICS["fills"]


def table(*rows: dict[str, Any]) -> Golden:
    return Golden(LIBTPU, {golden.key(row): row for row in rows})


def changed(row: dict[str, Any], **values: Any) -> dict[str, Any]:
    """A copy of a row with other values, in its schedule where they are there."""
    inside = {name: value for name, value in values.items() if name in row.get("schedule", {})}
    out = {**row, **{name: value for name, value in values.items() if name not in inside}}
    return {**out, "schedule": {**row["schedule"], **inside}} if inside else out


def test_a_table_survives_the_disk(tmp_path):
    path = tmp_path / "golden.json"
    saved = table(FINE, DECLINED, GRAPHICS)
    saved.save(path)
    assert golden.load(path) == saved
    text = path.read_text()
    saved.save(path)
    assert path.read_text() == text
    assert sum(line.lstrip().startswith('{"op"') for line in text.splitlines()) == 3


def test_no_table_is_empty_and_a_damaged_one_is_an_error(tmp_path):
    assert golden.load(tmp_path / "none.json") == Golden({}, {})
    for text in ("{", "{}", '{"versions": {}, "rows": [{"op": "x"}]}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(CorruptDataError, match="restore it"):
            golden.load(tmp_path / "bad.json")


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ({}, None),
        ({"cycles": 629}, None),
        ({"output_bytes": 5, "spills": 99}, None),
        ({"cycles": 631}, "cycles was 600, is 631 (+5.2%)"),
        ({"cycles": 569}, "cycles was 600, is 569 (-5.2%)"),
        ({"registers": 4}, "registers was None, is 4"),
        ({"bundles": 526}, "schedule: bundles was 500"),
        ({"argument_bytes": 1025}, "argument_bytes was 1024, is 1025"),
        ({"temporary_bytes": 11}, "temporary_bytes was 10, is 11"),
        ({"packed_bytes": 819_001}, "packed_bytes was 819000"),
        ({"status": "failed", "reason": "a bug"}, "status was ok, is failed (a bug)"),
        ({"schedule": {"reason": "aborts"}}, "cycles was 600, is None"),
    ],
)
def test_what_counts_as_a_difference(values, found):
    said = list(golden.differences(table(FINE, DECLINED), [changed(FINE, **values), DECLINED]))
    assert (said == []) is (found is None)
    assert found is None or any(found in line and line.startswith("decode int8 v5e") for line in said)


def test_a_row_that_is_new_or_turns_out_to_compile_is_a_difference():
    assert "not in the committed table" in next(golden.differences(table(), [FINE]))
    (line, *_) = golden.differences(table(DECLINED), [{**DECLINED, "status": "ok"}])
    assert "was unsupported, is ok" in line


def test_merging_keeps_what_was_not_compiled_and_drops_what_is_gone():
    old, new = table(FINE, DECLINED), changed(FINE, cycles=1)
    assert old.merged(LIBTPU, [new]).rows == table(new, DECLINED).rows
    assert old.merged(LIBTPU, [new], stale=[golden.key(DECLINED)]).rows == table(new).rows


def test_one_table_is_not_made_by_two_versions():
    with pytest.raises(UsageError, match=r"decode int2 v4 was compiled by .*0\.0\.42\.1, but here is .*0\.0\.50"):
        table(FINE, DECLINED).merged(NEWER, [FINE])
    whole = table(FINE, GRAPHICS).merged(NEWER, [FINE])
    assert whole.versions == NEWER and golden.key(GRAPHICS) in whole.rows


def test_other_versions_are_said_once_and_not_compared():
    compile_kernels.require_same_versions(table(FINE), LIBTPU)
    with pytest.raises(UsageError, match=r"0\.0\.42\.1; here is .*0\.0\.50.*constraints-hardware\.txt"):
        compile_kernels.require_same_versions(table(FINE), NEWER)


def test_the_ratio_is_of_compute_and_copies_to_memory():
    """819,000 bytes at 819 GB/s are 1 µs, which is 1,500 cycles at 1.5 GHz."""
    assert report.ratio(FINE) == pytest.approx((600 + 150) / 1500)
    assert report.ratio(changed(FINE, target="v4")) is None
    assert report.ratio(DECLINED) is None


def test_the_table_for_people_says_all_of_it():
    text = report.markdown(table(FINE, DECLINED, GRAPHICS))
    for part in (
        "libtpu 0.0.42.1",
        "### decode",
        "1,000 / 7",
        "| int8 | v5e | 2,048 | 819,000 | 500 | 600 | 150 | 1,500 | 0.50 |",
    ):
        assert part in text
    assert "| int8 | h100 | 128 | 0 | 4 | 4 |" in text
    assert "unsupported: no two-bit | types (int2 v4)" in text
    widths = {line.count("|") for line in text.splitlines() if line.startswith("| int8 |") and "v5e" in line}
    assert widths == {10}


def test_where_targets_differ_the_worst_is_named():
    other = changed(FINE, target="v6e", moved_bytes=67_108_864)
    (line,) = [s for s in report.markdown(table(FINE, other)).splitlines() if "67,108,864" in s]
    assert "| 0 to 67,108,864 (v6e) |" in line and "| 1,000 | 24 | 10 | 8 |" in line


def test_the_table_is_put_between_its_marks():
    document = f"# Title\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    once = report.insert(document, "new\n")
    assert once == f"# Title\n{report.BEGIN}\n\nnew\n\n{report.END}\nafter\n" and report.insert(once, "new\n") == once
    with pytest.raises(ValueError, match="lacks the marks"):
        report.insert("# Title\n", "new\n")


COMMITTED = golden.load()


def test_the_document_holds_the_committed_table():
    text = report.PATH.read_text(encoding="utf-8")
    assert report.insert(text, report.markdown(COMMITTED)) == text, "run experiments.compile_kernels --update"
    assert report.clocks() in text


def test_everything_committed_compiles_or_is_declined_with_a_reason():
    for key, row in COMMITTED.rows.items():
        assert row["status"] in ("ok", "unsupported"), key
        assert row["status"] == "ok" or row["reason"], key
        assert row["target"] in BY_NAME, key


def test_the_cores_are_those_of_the_published_peak():
    """Peak bf16 operations are 2 per unit of the matrix units and cycle; so the stated clocks follow."""
    peaks = {"v5e": (197e12, 4 * 128**2), "v5p": (459e12 / 2, 4 * 128**2), "v6e": (918e12, 4 * 256**2)}
    for name, (peak, units) in peaks.items():
        core = BY_NAME[name].core
        assert core is not None and core.gigahertz * 1e9 == pytest.approx(peak / (2 * units), rel=0.01)
    v5p = BY_NAME["v5p"].core
    assert v5p is not None and v5p.gigabytes_per_second == 1382.5
