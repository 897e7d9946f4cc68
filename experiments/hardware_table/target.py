"""The accelerators that kernels are compiled for, and the numbers by which a schedule becomes a time."""

from __future__ import annotations

import dataclasses

from experiments.hardware_table import gpu, tpu
from experiments.hardware_table.toolchain import Toolchain


@dataclasses.dataclass(frozen=True)
class Core:
    """What the static schedule of one TPU core is compared with.

    Attributes:
      gigahertz: the clock; vendors publish peak operations, from which it follows.
      gigabytes_per_second: HBM bandwidth of one core; the cores of a chip share it evenly.
      source: where both numbers come from.
    """

    gigahertz: float
    gigabytes_per_second: float
    source: str

    def cycles(self, read: int) -> float:
        """Cycles that HBM needs for `read` bytes."""
        return read / self.gigabytes_per_second * self.gigahertz


@dataclasses.dataclass(frozen=True)
class Target:
    """An accelerator.

    Attributes:
      name: as in the table.
      implementation: the name that an op's implementation for it has.
      topology: what the compiler calls the smallest machine that has it.
      toolchain: how a program is compiled for it and what the compiler tells about it.
      core: None where static cycles cannot be had or the numbers are not public.
    """

    name: str
    implementation: str
    topology: str
    toolchain: Toolchain
    core: Core | None = None


TARGETS = (
    # The compiler has no cycle model of v4 ("Dma latency model is currently only supported on VF/VL/GF/GL"), and the
    # one of tpu7x aborts on most kernels.
    Target("v4", "pallas_tpu", "v4:2x2x1", tpu.TOOLCHAIN),
    Target(
        "v5e",
        "pallas_tpu",
        "v5e:2x2",
        tpu.TOOLCHAIN,
        Core(1.5, 819, "published: 819 GB/s; 197 TFLOP/s of 4 matrix units of 128 x 128"),
    ),
    Target(
        "v5p",
        "pallas_tpu",
        "v5p:2x2x1",
        tpu.TOOLCHAIN,
        Core(1.75, 2765 / 2, "published: 2765 GB/s for 2 cores; 459 TFLOP/s of 2 x 4 matrix units of 128 x 128"),
    ),
    Target(
        "v6e",
        "pallas_tpu",
        "v6e:2x2",
        tpu.TOOLCHAIN,
        Core(1.75, 1640, "published: 1640 GB/s; the clock is assumed (918 TFLOP/s if it has 4 units of 256 x 256)"),
    ),
    Target("tpu7x", "pallas_tpu", "tpu7x:2x2x1", tpu.TOOLCHAIN),
    Target("h100", "pallas_gpu", "h100", gpu.TOOLCHAIN),
)

BY_NAME = {target.name: target for target in TARGETS}
