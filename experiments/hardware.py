"""Which accelerator this machine has, asked of the machine and not of jax: jax may have fallen back to the CPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

#: The first NVIDIA driver that serves CUDA 13; older ones need the CUDA 12 packages.
CUDA13_DRIVER = 580

TPU_VARIABLES = ("TPU_NAME", "TPU_ACCELERATOR_TYPE", "TPU_WORKER_ID", "COLAB_TPU_ADDR")


class Accelerator(NamedTuple):
    """An accelerator of this machine: the extra that drives it, and how it was recognised."""

    extra: Literal["tpu", "cuda12", "cuda13"]
    evidence: str

    @property
    def backend(self) -> str:
        """What `jax.default_backend()` answers when the accelerator is used."""
        return "tpu" if self.extra == "tpu" else "gpu"


def find(devices: Path = Path("/dev"), variables: Mapping[str, str] = os.environ) -> Accelerator | None:
    """The accelerator of this machine, or None. Neither imports jax nor touches the device."""
    names = sorted(path.name for path in devices.iterdir()) if devices.is_dir() else []
    nvidia = next((name for name in names if re.fullmatch(r"nvidia\d+", name)), None)
    driver = nvidia_driver()
    if nvidia or driver:
        extra = "cuda13" if driver and driver[0] >= CUDA13_DRIVER else "cuda12"
        version = ".".join(map(str, driver)) if driver else "unknown"
        return Accelerator(extra, f"NVIDIA driver {version}" if driver else f"{devices / str(nvidia)}")
    chip = next((name for name in names if re.fullmatch(r"accel\d+", name)), None)
    if chip:
        return Accelerator("tpu", str(devices / chip))
    vfio = next(devices.glob("vfio/[0-9]*"), None)
    variable = next((name for name in TPU_VARIABLES if variables.get(name)), None)
    if vfio or variable:
        return Accelerator("tpu", str(vfio or f"the variable {variable}"))
    return None


def nvidia_driver() -> tuple[int, ...] | None:
    """The version of the NVIDIA driver, or None where nvidia-smi is missing or finds no device."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    version = re.match(r"(\d+)\.(\d+)", answer.strip())
    return (int(version[1]), int(version[2])) if version else None
