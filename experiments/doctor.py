"""Checks Python, jax, devices and kernels, and says how to fix what is wrong. Exit code 1 if something is."""

from __future__ import annotations

import dataclasses
import importlib
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from experiments import compile_cache, environment, hardware

REFERENCE_FILES = ("config.json", "model.safetensors", "tokenizer.json")


@dataclasses.dataclass(frozen=True)
class Config:
    """No options: the checks take a few seconds and change nothing."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """What one check found. `fix` is a command or a sentence, where something can be done."""

    name: str
    status: Literal["ok", "note", "fail"]
    detail: str
    fix: str = ""


def main(config: Config) -> int:
    """Prints all findings; returns 1 if one of them is a failure."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    styles = {"ok": "green", "note": "yellow", "fail": "bold red"}
    table = Table.grid(padding=(0, 2))
    failures = 0
    for finding in examine():
        failures += finding.status == "fail"
        table.add_row(Text(finding.status, styles[finding.status]), finding.name, Text(finding.detail))
        if finding.fix:
            table.add_row("", "", Text(f"fix: {finding.fix}", "bold"))
    console.print(table)
    console.print("everything works" if not failures else f"{failures} to fix")
    return 1 if failures else 0


def examine() -> Iterator[Finding]:
    """All checks, in the order in which one explains the next."""
    yield python()
    installed = environment.versions()
    yield from packages(installed)
    try:
        jax = importlib.import_module("jax")
        backend = jax.default_backend()
    except Exception as error:  # whatever stops jax from starting is the finding
        yield Finding("jax", "fail", f"does not start: {error}", "pip install --upgrade --force-reinstall jax jaxlib")
        return
    yield devices(jax.devices())
    yield accelerator(hardware.find(), backend, installed, os.environ)
    yield from kernels()
    yield memory(jax.devices()[0])
    yield compilation_cache(compile_cache.enable())
    yield reference_model()


def python() -> Finding:
    """The interpreter that runs this."""
    return Finding("python", "ok", f"{platform.python_version()} ({platform.system()} {platform.machine()})")


def packages(installed: Mapping[str, str]) -> Iterator[Finding]:
    """Versions; a CUDA plugin only works with the jaxlib of its own release (jax warns, then runs on the CPU)."""
    jax, jaxlib = installed.get("jax", "missing"), installed.get("jaxlib", "missing")
    plugins = _plugins(installed)
    listed = ", ".join(f"{name} {version}" for name, version in {"jaxlib": jaxlib, **plugins}.items())
    if any(_release(version) != _release(jaxlib) for version in plugins.values()):
        extra = next(iter(plugins)).split("-")[1]
        yield Finding("jax", "fail", f"{jax} with {listed}: they do not belong together", _install(extra, jax))
    else:
        yield Finding("jax", "ok", f"{jax} with {listed}")
    rest = {name: version for name, version in installed.items() if name not in ("jax", "jaxlib", *plugins)}
    yield Finding("packages", "ok", ", ".join(f"{name} {version}" for name, version in rest.items()))


def devices(found: list[Any]) -> Finding:
    """What jax computes on."""
    kinds = sorted({f"{device.platform} ({device.device_kind})" for device in found})
    return Finding("devices", "ok", f"{len(found)} x {', '.join(kinds)}")


def accelerator(
    present: hardware.Accelerator | None, backend: str, installed: Mapping[str, str], variables: Mapping[str, str]
) -> Finding:
    """Whether the accelerator of this machine is the one that jax uses, or jax fell back to the CPU silently."""
    if present is None:
        return Finding("accelerator", "ok", f"none on this machine; jax uses {backend}")
    if backend == present.backend:
        return Finding("accelerator", "ok", f"{present.evidence}: used")
    asked = variables.get("JAX_PLATFORMS", "")
    if asked:
        detail = f"{present.evidence} is not used because JAX_PLATFORMS={asked}"
        return Finding("accelerator", "note", detail, "unset JAX_PLATFORMS")
    return Finding("accelerator", "fail", *_fallback(present, backend, installed))


def kernels() -> Iterator[Finding]:
    """Which implementations of the attention kernels run on this backend, best first, and why the others do not."""
    import pallas_kernels

    rows = pallas_kernels.supported()
    for op in dict.fromkeys(row.op for row in rows):
        parts = [
            f"{r.implementation}" if r.runs else f"{r.implementation} not ({r.reason})" for r in rows if r.op == op
        ]
        runs = any(row.runs for row in rows if row.op == op)
        yield Finding("kernel", "ok" if runs else "fail", f"{op}: {', '.join(parts)}")


def memory(device: Any) -> Finding:
    """Free memory of the host, and of the first device where it has its own."""
    gibibyte = 1 << 30
    page, total = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_PHYS_PAGES")
    detail = f"host {page * total / gibibyte:.1f} GiB"
    statistics = device.memory_stats() or {}
    if "bytes_limit" in statistics:
        detail += f", {device.device_kind} {statistics['bytes_limit'] / gibibyte:.1f} GiB"
    return Finding("memory", "ok", detail)


def compilation_cache(folder: Path | None) -> Finding:
    """Where compiled programs are kept. Whoever can write there can run code in this process."""
    name = "compile cache"
    if folder is None:
        return Finding(name, "note", "none: every run compiles again", f"export {compile_cache.VARIABLE}=FOLDER")
    if "://" in str(folder) or not folder.is_dir():
        return Finding(name, "ok", str(folder))
    if not compile_cache.private(folder):
        detail = f"{folder} can be written by others, and jax runs what lies there"
        return Finding(name, "fail", detail, f"chmod go-w {folder}, and own it")
    return Finding(name, "ok", f"{folder}, {sum(1 for _ in folder.iterdir())} files")


def reference_model() -> Finding:
    """Whether the model that ships with the package is whole."""
    folder = resources.files("kvjax") / "assets" / "reference"
    missing = [name for name in REFERENCE_FILES if not (folder / name).is_file()]
    if missing:
        detail = f"the shipped model lacks {', '.join(missing)}"
        return Finding("model", "fail", detail, "install kvjax again: pip install --force-reinstall --no-deps kvjax")
    return Finding("model", "ok", "the reference model is there: kvjax demo")


def _fallback(present: hardware.Accelerator, backend: str, installed: Mapping[str, str]) -> tuple[str, str]:
    """Why jax does not see the accelerator, and the command that installs what drives it."""
    jax, jaxlib = installed.get("jax", ""), installed.get("jaxlib", "")
    plugins = _plugins(installed)
    fix = _install(present.extra, jax)
    if present.extra == "tpu" and "libtpu" in installed:
        why = f"libtpu {installed['libtpu']} belongs to another jax, or another process holds the TPU"
    elif present.extra == "tpu":
        why = "libtpu is not installed"
    elif not plugins:
        why = "no CUDA plugin is installed"
    elif any(_release(version) != _release(jaxlib) for version in plugins.values()):
        why = f"{', '.join(f'{name} {version}' for name, version in plugins.items())} is not for jaxlib {jaxlib}"
    else:
        why, fix = f"the CUDA plugin matches jax {jax} but cannot use the driver", "nvidia-smi must list the GPU"
    return f"{present.evidence} is there but jax runs on {backend}: {why}", fix


def _plugins(installed: Mapping[str, str]) -> dict[str, str]:
    return {name: version for name, version in installed.items() if name.startswith("jax-cuda")}


def _release(version: str) -> str:
    """The version without a local part such as `+cuda12`."""
    return version.split("+")[0]


def _install(extra: str, jax: str) -> str:
    return f'{sys.executable} -m pip install --upgrade "jax[{extra}]=={jax}"'
