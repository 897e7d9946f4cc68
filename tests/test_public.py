"""The public names: all there, documented, and free to import."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import kvjax

NAMES = [name for name in kvjax.__all__ if name != "__version__"]


@pytest.mark.smoke
@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_is_there_and_documented(name):
    value = getattr(kvjax, name)
    assert inspect.getdoc(value)
    assert name in dir(kvjax)
    if not inspect.ismodule(value):
        assert value.__name__ == name


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, kvjax; print([m for m in ('jax', 'numpy', 'flax', 'rich', 'tokenizers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'snapkv'"):
        _ = kvjax.snapkv  # type: ignore[attr-defined]
