"""XLA is asked for wide vectors where the processor has them, and never against the user's will."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from experiments import wide_vectors


@pytest.mark.parametrize(("flags", "has"), [("fpu avx512f sse", True), ("fpu avx512 avx2", False), ("", False)])
def test_the_first_processor_decides(tmp_path: Path, flags: str, has: bool) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text(f"processor : 0\nflags : {flags}\n\nprocessor : 1\nflags : avx512f\n")
    assert wide_vectors.processor_has_them(info) is has
    assert not wide_vectors.processor_has_them(tmp_path / "none")


def test_flags_are_added_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wide_vectors, "processor_has_them", lambda: True)
    monkeypatch.setenv("XLA_FLAGS", "--xla_other=1")
    assert wide_vectors.enable()
    assert os.environ["XLA_FLAGS"] == "--xla_other=1 --xla_cpu_prefer_vector_width=512"
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_prefer_vector_width=256")
    assert not wide_vectors.enable()
    assert os.environ["XLA_FLAGS"] == "--xla_cpu_prefer_vector_width=256"
