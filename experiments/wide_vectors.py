"""512-bit vectors on processors that have them: XLA uses 256 bits of them unless it is told otherwise."""

from __future__ import annotations

import os
from pathlib import Path

FLAG = "--xla_cpu_prefer_vector_width"


def enable() -> bool:
    """Asks XLA for them through XLA_FLAGS, unless the user has asked for a width; says whether they are asked for.

    It must happen before JAX touches its CPU device. Where the processor has none, or its features cannot be read
    (outside Linux), nothing changes.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if FLAG in flags or not processor_has_them():
        return False
    os.environ["XLA_FLAGS"] = f"{flags} {FLAG}=512".strip()
    return True


def processor_has_them(cpu_info: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the first processor lists AVX-512."""
    if not cpu_info.is_file():
        return False
    lines = cpu_info.read_text(encoding="utf-8", errors="replace").splitlines()
    return "avx512f" in next((line for line in lines if line.startswith("flags")), "").split()
