"""Compiled programs kept between runs, in the user's own cache folder: a second demo does not compile again."""

from __future__ import annotations

import hashlib
import os
import platform
import stat
from pathlib import Path

VARIABLE = "JAX_COMPILATION_CACHE_DIR"


def enable() -> Path | None:
    """Turns on jax's persistent compilation cache, unless the user has chosen one; returns the folder in use.

    The folder is private to the user, because jax loads machine code from it, and is named after the processor,
    because such code only runs where it was made. Returns None, and changes nothing, where there is no such folder to
    be had.
    """
    if os.environ.get(VARIABLE):
        return Path(os.environ[VARIABLE])
    folder = user_folder() / "xla" / machine()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not private(folder):
            return None
    except OSError:
        return None
    import jax

    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    return folder


def user_folder() -> Path:
    """Where this user's programs keep what they can make again, per the XDG base directory specification."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "kvjax"


def machine() -> str:
    """A short name for this processor and what it can do."""
    features = platform.processor()
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.is_file():
        wanted = ("model name", "flags", "Features", "CPU part")
        lines = cpu_info.read_text(encoding="utf-8", errors="replace").splitlines()
        features = "\n".join(sorted({line for line in lines if line.startswith(wanted)}))
    return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:12]}"


def private(folder: Path) -> bool:
    """Whether the folder is this user's, and nobody else can write to it."""
    if not hasattr(os, "getuid"):
        return True
    status = folder.stat()
    return status.st_uid == os.getuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
