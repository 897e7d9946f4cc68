"""Compiling for TPUs that are not there: libtpu's own compiler, and the schedules it dumps."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from experiments.hardware_table.toolchain import Toolchain

DUMP, PROFILE = "dump", "profile"


def variables(folder: Path, cycles: bool) -> Mapping[str, str]:
    """See `Toolchain.variables`."""
    # All passes of a program with loops of XLA's own would be a gigabyte.
    flags = {
        "xla_jf_dump_to": folder / DUMP,
        "xla_jf_dump_llo_text": "true",
        "xla_jf_dump_llo_pass_label_regex": "final_",
    }
    if cycles:
        flags["xla_jf_dump_static_llo_profile_to"] = folder / PROFILE
    return {
        "LIBTPU_INIT_ARGS": " ".join(f"--{name}={value}" for name, value in flags.items()),
        # Left alone, a kernel that fails to compile can fill the disk with logs.
        "TPU_LOG_DIR": "disabled",
        "TPU_MIN_LOG_LEVEL": "3",
        "TPU_STDERR_LOG_LEVEL": "3",
        "TPU_SKIP_MDS_QUERY": "1",
        # libtpu otherwise lets only one process of the machine load it.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }


def device(topology: str) -> Any:
    """See `Toolchain.device`."""
    from jax.experimental import topologies

    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]


def code(folder: Path) -> dict[str, int]:
    """Of the Pallas kernels of a program: `bundles`, `spills` and `fills`; `cycles` if they were estimated.

    Spills and fills are the slots that store to and load from the spill area, counted once per place in the code.
    """
    kernels = list(_kernels(folder / DUMP))
    if not kernels:
        return {}
    slots = [utilization(usage.read_text(errors="replace")) for _, usage in kernels]
    found = {
        "bundles": sum(bundles(analysis.read_text(errors="replace")) for analysis, _ in kernels),
        "spills": sum(slot.get("VSTORE:SPILL", 0) for slot in slots),
        "fills": sum(slot.get("VLOAD:FILL", 0) for slot in slots),
    }
    profiles = sorted((folder / PROFILE).glob("*.textproto"))
    estimates = [estimate for path in profiles for estimate in estimated_cycles(path.read_text(errors="replace"))]
    return found | ({"cycles": sum(estimates)} if estimates else {})


def _kernels(dump: Path) -> Iterator[tuple[Path, Path]]:
    """The schedule analysis and the slot use of every Pallas kernel of a program.

    File names are <time>-<instruction>-<number>-<stage>.txt; TLP is the program that calls the kernels.
    """
    stage = re.compile(r"\d+-(?P<instruction>.+)-\d+-schedule-analysis_final_bundles\.txt")
    for analysis in sorted(dump.glob("*-schedule-analysis_final_bundles.txt")):
        name = stage.fullmatch(analysis.name)
        if name is None or name["instruction"] == "TLP" or not is_pallas(analysis.read_text(errors="replace")):
            continue
        start = re.escape(analysis.name.split("-")[0] + "-" + name["instruction"])
        usage = re.compile(start + r"-\d+-final_hlo-static-per-bundle-utilization\.txt")
        found = [path for path in dump.iterdir() if usage.fullmatch(path.name)]
        if len(found) != 1:
            raise ValueError(f"{name['instruction']} has {len(found)} tables of slot use; libtpu dumps in another form")
        yield analysis, found[0]


def is_pallas(analysis: str) -> bool:
    """Whether a schedule analysis is that of a Pallas kernel."""
    return 'custom_call_target="tpu_custom_call"' in analysis


def bundles(analysis: str) -> int:
    """Number of VLIW bundles that a schedule analysis states."""
    stated = re.search(r"total scheduled bundles:\s*(\d+)", analysis)
    if stated is None:
        raise ValueError("a schedule analysis states no number of bundles; libtpu's dump has another form")
    return int(stated[1])


def utilization(text: str) -> dict[str, int]:
    """Slots in use, summed over all bundles, by unit; the header names the units, then comes a line per bundle."""
    head, _, table = text.partition("== UTILIZATION:")
    names = [name.strip() for line in head.splitlines() if "," in line for name in line.split(",")]
    rows = [[int(cell) for cell in line.split()] for line in table.splitlines() if line.strip()]
    if not names or any(len(row) != len(names) for row in rows):
        raise ValueError("a table of slot use does not have a number per unit; libtpu's dump has another form")
    return {name: sum(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}


def estimated_cycles(profile: str) -> Iterator[int]:
    """Estimates of a static profile, one per kernel."""
    for found in re.finditer(r"estimated_cycles:\s*(\d+)", profile):
        yield int(found[1])


TOOLCHAIN = Toolchain("tpu", "tpu", ("libtpu",), variables, device, code)
