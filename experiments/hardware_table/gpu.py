"""Compiling for an H100 that is not there: Mosaic GPU, and the PTX and register counts that it prints."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.hardware_table.toolchain import Toolchain

#: What the driver of an H100 (SXM, 80 GB) would tell the compiler.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84929347584
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def variables(folder: Path, cycles: bool) -> Mapping[str, str]:
    """See `Toolchain.variables`; there is no estimate of cycles."""
    return {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "MOSAIC_GPU_DUMP_PTX": "1", "MOSAIC_GPU_DUMP_PTXAS": "1"}


def device(topology: str) -> Any:
    """See `Toolchain.device`."""
    from jax.experimental import topologies

    described = {"target_config": H100, "topology": "1x1x1"}
    return topologies.get_topology_desc(platform="cuda", topology_name=topology, **described).devices[0]


def code(folder: Path) -> dict[str, int]:
    """Of the Mosaic kernels of a program, from what the compiling process printed; {} where there is none.

    `registers` (most per thread), `spill_bytes` (stores and loads), `bulk_copies` (asynchronous, global to shared
    memory) and `barriers` (mbarriers initialised: one per stage of every pipeline).
    """
    return ptx((folder / "stdout").read_text(errors="replace"))


def ptx(text: str) -> dict[str, int]:
    """The numbers of `code` from PTX followed by what ptxas says of it, for any number of kernels."""
    registers = [int(found) for found in re.findall(r"Used (\d+) registers", text)]
    if not registers:
        return {}
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", text)
    return {
        "registers": max(registers),
        "spill_bytes": sum(map(int, spills)),
        "bulk_copies": len(re.findall(r"\bcp\.async\.bulk\.(?:tensor\.\dd\.)?shared::\w+\.global\.", text)),
        "barriers": len(re.findall(r"\bmbarrier\.init\.", text)),
    }


TOOLCHAIN = Toolchain("gpu", "cuda", ("jax-cuda13-plugin", "jax-cuda13-pjrt"), variables, device, code)
