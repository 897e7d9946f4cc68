"""One environment for every test: CPU with eight devices, a persistent compilation cache, reproducible examples.

The variables are set before jax is imported, and processes that a test starts inherit them.
"""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

import hypothesis

ROOT = Path(__file__).resolve().parent.parent

assert "jax" not in sys.modules, "jax was imported before the suite could choose its devices"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # programs run for milliseconds: compile them quickly
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

hypothesis.settings.register_profile(
    "kvjax",
    deadline=None,
    derandomize=True,
    max_examples=25,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "kvjax"))

_MOST_MAPS, _EVERY = 20_000, 25
_finished = 0


def pytest_runtest_teardown() -> None:
    """Forgets compiled programs before there are too many: each maps memory, and Linux allows 65,530 maps a process."""
    global _finished
    _finished += 1
    maps = Path("/proc/self/maps")
    if _finished % _EVERY or not maps.exists():
        return
    with maps.open("rb") as lines:
        many = sum(1 for _ in lines) > _MOST_MAPS
    if many:
        import jax

        jax.clear_caches()
        gc.collect()
