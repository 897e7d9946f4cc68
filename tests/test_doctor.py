"""`kvjax doctor` and `kvjax methods`: what they find, and the fix that they name."""

from __future__ import annotations

import subprocess
import sys

import pytest

from experiments import doctor, hardware, methods
from kvjax.cache.codec import Integer
from kvjax.cache.layout import CacheDims
from kvjax.cache.methods import METHODS

GPU = hardware.Accelerator("cuda12", "NVIDIA driver 550.54")
TPU = hardware.Accelerator("tpu", "/dev/accel0")
JAX = {"jax": "0.10.2", "jaxlib": "0.10.2"}


def test_this_machine_passes(monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    found = list(doctor.examine())
    assert [finding for finding in found if finding.status == "fail"] == []
    assert {finding.name for finding in found} >= {
        "python",
        "jax",
        "devices",
        "accelerator",
        "kernel",
        "memory",
        "model",
    }


def test_the_command_prints_all_of_it_in_100_columns():
    done = subprocess.run([sys.executable, "-m", "experiments", "doctor"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith("everything works")
    assert max(map(len, done.stdout.splitlines())) <= 100


def test_an_accelerator_that_is_used_is_fine():
    assert doctor.accelerator(GPU, "gpu", JAX, {}).status == "ok"
    assert doctor.accelerator(None, "cpu", JAX, {}).status == "ok"


@pytest.mark.parametrize(
    ("present", "plugins", "why", "extra"),
    [
        (GPU, {}, "no CUDA plugin is installed", "cuda12"),
        (GPU, {"jax-cuda12-plugin": "0.7.2"}, "jax-cuda12-plugin 0.7.2 is not for jaxlib 0.10.2", "cuda12"),
        (TPU, {}, "libtpu is not installed", "tpu"),
        (TPU, {"libtpu": "0.0.17"}, "libtpu 0.0.17 belongs to another jax", "tpu"),
    ],
)
def test_a_silent_fall_back_to_the_cpu_is_found_and_the_exact_fix_named(present, plugins, why, extra):
    found = doctor.accelerator(present, "cpu", JAX | plugins, {})
    assert found.status == "fail"
    assert present.evidence in found.detail and "runs on cpu" in found.detail and why in found.detail
    assert found.fix == f'{sys.executable} -m pip install --upgrade "jax[{extra}]==0.10.2"'


def test_a_plugin_that_fits_points_to_the_driver():
    found = doctor.accelerator(GPU, "cpu", JAX | {"jax-cuda12-plugin": "0.10.2+local"}, {})
    assert found.status == "fail"
    assert "nvidia-smi" in found.fix


def test_a_platform_that_was_asked_for_is_a_note():
    found = doctor.accelerator(GPU, "cpu", JAX, {"JAX_PLATFORMS": "cpu"})
    assert (found.status, found.fix) == ("note", "unset JAX_PLATFORMS")


def test_parts_of_different_releases_are_found():
    (jax, _) = doctor.packages(JAX | {"jax-cuda13-plugin": "0.9.0", "numpy": "2.4.6"})
    assert jax.status == "fail"
    assert "jax[cuda13]==0.10.2" in jax.fix
    (jax, packages) = doctor.packages(JAX | {"jax-cuda13-plugin": "0.10.2", "numpy": "2.4.6"})
    assert jax.status == "ok"
    assert packages.detail == "numpy 2.4.6"


def test_a_shared_compile_cache_is_refused(tmp_path):
    tmp_path.chmod(0o700)
    assert doctor.compilation_cache(tmp_path).status == "ok"
    tmp_path.chmod(0o777)
    assert doctor.compilation_cache(tmp_path).status == "fail"
    assert doctor.compilation_cache(None).status == "note"


def test_hardware_is_recognised_by_its_devices(tmp_path, monkeypatch):
    monkeypatch.setattr(hardware, "nvidia_driver", lambda: None)
    assert hardware.find(tmp_path, {}) is None
    assert hardware.find(tmp_path, {"TPU_NAME": "v5e"}) == ("tpu", "the variable TPU_NAME")
    (tmp_path / "accel0").touch()
    assert hardware.find(tmp_path, {}) == ("tpu", str(tmp_path / "accel0"))
    (tmp_path / "nvidia0").touch()
    assert hardware.find(tmp_path, {}) == ("cuda12", str(tmp_path / "nvidia0"))


@pytest.mark.parametrize(("version", "extra"), [((550, 54), "cuda12"), ((580, 65), "cuda13")])
def test_the_driver_decides_which_cuda(tmp_path, monkeypatch, version, extra):
    monkeypatch.setattr(hardware, "nvidia_driver", lambda: version)
    found = hardware.find(tmp_path, {})
    assert found is not None and found.extra == extra and found.backend == "gpu"


def test_the_driver_is_read_from_nvidia_smi(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 570.133.20\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert hardware.nvidia_driver() == (570, 133)
    program.write_text("#!/bin/sh\necho 'No devices were found'\nexit 6\n")
    assert hardware.nvidia_driver() is None


DIMS = CacheDims(1, 8, 8, 128, 1, 1)


@pytest.mark.parametrize("name", METHODS)
def test_every_named_method_is_described(name):
    entry = methods.describe(name, METHODS[name], dims=DIMS)
    assert entry.summary.endswith(".")
    assert entry.paper
    assert all(0 < bits <= 16 for bits in entry.bits)
    assert (entry.axes == ()) == (name == "full")


def test_what_a_method_chooses_is_spelled_out():
    entry = methods.describe("kivi-2", METHODS["kivi-2"], dims=DIMS)
    assert dict(entry.axes)["recent"] == "128"
    assert dict(entry.axes)["keys"].startswith("Integer(bits=2")
    assert entry.bits == (3.0, 3.0)  # a scale and a zero point of 16 bits for 32 elements
    assert "Liu et al., 2024" in entry.paper and not entry.paper.endswith(".")
    assert methods.spelled(Integer(bits=4, group=16)) == "Integer(bits=4, axis=token, group=16, symmetric=False)"
    assert dict(methods.describe("streaming_llm", METHODS["streaming_llm"], DIMS).axes)["policy"] == "Recency()"


def test_the_methods_are_listed(capsys):
    methods.main(methods.Config())
    printed = capsys.readouterr().out
    assert all(name in printed for name in METHODS)
    assert "snapkv:tokens=256+int4" in printed
