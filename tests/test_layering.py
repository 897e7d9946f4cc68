"""The direction of dependencies: kernels know no cache, caches no model, models no method, none an experiment."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("kvjax", "pallas_kernels", "experiments")

#: For each layer what of this repository it may import; a name stands for itself and all below it. The longest
#: matching name is a module's layer.
BASE = ("kvjax.__version__", "kvjax.errors", "kvjax.typing", "kvjax.compat", "kvjax.sharding", "kvjax.describe")
#: All that a model sees of a cache: what it hands over, attention without one, and what else stands where one does.
PROTOCOL = ("kvjax.cache.step", "kvjax.cache.prompt", "kvjax.cache.shared", "kvjax.cache.convolution_state")
LAYERS = {
    "pallas_kernels": ("pallas_kernels",),
    "kvjax.errors": (),
    "kvjax.describe": ("kvjax.errors",),
    "kvjax.typing": (),
    "kvjax.compat": (),
    "kvjax.progress": (),
    "kvjax.sharding": ("kvjax.errors", "kvjax.typing", "kvjax.compat", "kvjax.cache.exchange"),
    "kvjax.assets": ("kvjax.errors",),
    "kvjax.tasks": ("kvjax.tasks", "kvjax.errors"),
    "kvjax.cache": ("kvjax.cache", "pallas_kernels", *BASE),
    "kvjax.cache.exchange": ("kvjax.typing",),
    "kvjax.attention": ("kvjax.attention", *PROTOCOL, "pallas_kernels", *BASE),
    "kvjax.models": (
        "kvjax.models",
        "kvjax.attention",
        *PROTOCOL,
        "kvjax.assets",
        "pallas_kernels.rope",
        *BASE,
    ),
    "kvjax.engine": ("kvjax.engine", "kvjax.models", "kvjax.cache", *BASE),
    "kvjax.training": (
        "kvjax.training",
        "kvjax.models",
        "kvjax.tasks",
        "kvjax.assets",
        *PROTOCOL,
        "kvjax.cache.hiding",
        *BASE,
    ),
    "kvjax.convert": ("kvjax.convert", "kvjax.models", "kvjax.attention", "kvjax.cache", *BASE),
    "kvjax.calibration": (
        "kvjax.calibration",
        "kvjax.convert",
        "kvjax.engine",
        "kvjax.models",
        "kvjax.cache",
        "kvjax.tasks",
        "kvjax.progress",
        *BASE,
    ),
    "kvjax.evaluation": (
        "kvjax.evaluation",
        "kvjax.progress",
        "kvjax.engine",
        "kvjax.models",
        "kvjax.cache",
        "kvjax.tasks",
        "kvjax.assets",
        *BASE,
    ),
    "kvjax": ("kvjax",),
    "experiments": ("experiments", "kvjax", "pallas_kernels"),
}

#: Layers that other people's machines run with little else installed: the only other packages that they may import.
OUTSIDE = {
    "pallas_kernels": {"jax", "numpy"},
    "kvjax.errors": set(),
    "kvjax.progress": {"rich"},
    "kvjax.tasks": {"numpy"},
    "kvjax.cache": {"jax", "numpy", "ml_dtypes", "chex", "tensorstore"},
    "kvjax.attention": {"jax", "numpy", "flax"},
}

#: Names that are deprecated, or that run code which comes from a file.
FORBIDDEN = (
    "jax.experimental.pjit",
    "jax.experimental.shard_map",
    "jax.experimental.pallas.triton",
    "jax.experimental.pallas.ops.gpu",
    "pickle",
    "cloudpickle",
    "dill",
    "marshal",
    "shelve",
)
FORBIDDEN_CALLS = ("eval", "exec")

#: The only module that may ask which version of jax, flax or Python it runs on.
COMPAT = "kvjax.compat"


class Import(NamedTuple):
    """An import statement of one module; `name` is dotted and as deep as the statement names."""

    module: str
    name: str
    line: int


def modules() -> dict[str, Path]:
    """Every module of the three packages by its dotted name."""
    paths = (path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py")))
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


MODULES = modules()


def imports(module: str) -> Iterator[Import]:
    """All imports of a module, also those inside functions; not those for type checkers only, which never happen."""
    path, source_tree = MODULES[module], tree(module)
    for node in ast.walk(source_tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(source_tree):
        if isinstance(node, ast.Import):
            yield from (Import(module, alias.name, node.lineno) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*parents, *filter(None, [node.module])])
            yield from (Import(module, f"{source}.{alias.name}", node.lineno) for alias in node.names)


def tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def within(name: str, layers) -> str | None:
    """The longest of the dotted names that `name` is or lies below."""
    return max((layer for layer in layers if name == layer or name.startswith(layer + ".")), key=len, default=None)


def violations(module: str) -> Iterator[str]:
    """What a module imports against the direction of dependencies."""
    layer = within(module, LAYERS)
    assert layer is not None, f"{module} belongs to no layer"
    for one in imports(module):
        first = one.name.split(".")[0]
        if first in PACKAGES and within(one.name, LAYERS[layer]) is None:
            yield f"{module}:{one.line} imports {one.name}; {layer} may import {', '.join(LAYERS[layer]) or 'nothing'}"
        outside = OUTSIDE.get(layer)
        if outside is not None and first not in (*PACKAGES, *outside, *sys.stdlib_module_names):
            yield f"{module}:{one.line} imports {one.name}; of other packages {layer} may import {sorted(outside)}"
        if (found := within(one.name, FORBIDDEN)) is not None:
            yield f"{module}:{one.line} imports {found}"


@pytest.mark.smoke
@pytest.mark.parametrize("module", MODULES)
def test_imports_follow_the_direction_of_dependencies(module):
    assert list(violations(module)) == []


@pytest.mark.parametrize("module", MODULES)
def test_nothing_runs_code_that_comes_from_data(module):
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in FORBIDDEN_CALLS, f"{module}:{node.lineno} calls {node.func.id}"
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            assert isinstance(node.value, ast.Constant) and node.value.value is False, f"{module}:{node.lineno}"


@pytest.mark.parametrize("module", [module for module in MODULES if module.split(".")[0] != "experiments"])
def test_only_one_module_asks_for_versions(module):
    """`__version__` or `version_info` in a comparison is a branch on a version."""
    if module == COMPAT:
        return
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Compare):
            asked = {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)} & {"__version__", "version_info"}
            assert not asked, f"{module}:{node.lineno} branches on {asked}; only {COMPAT} may"


def test_no_module_opens_a_mesh_by_the_deprecated_with_statement():
    for module in MODULES:
        for node in ast.walk(tree(module)):
            if isinstance(node, ast.With):
                names = {ast.unparse(item.context_expr) for item in node.items}
                assert not names & {"mesh", "self.mesh"}, f"{module}:{node.lineno}"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import kvjax.models", "imports kvjax.models"),
        ("def f():\n    from kvjax.engine import decode", "imports kvjax.engine.decode"),
        ("from ..models import config", "imports kvjax.models.config"),
        ("from . import step", None),
        ("if TYPE_CHECKING:\n    import kvjax.models", None),
        ("import torch", "imports torch"),
        ("from jax.experimental import pjit", "imports jax.experimental.pjit"),
        ("from jax.experimental.shard_map import shard_map", "imports jax.experimental.shard_map"),
        ("import jax.numpy as jnp", None),
    ],
)
def test_the_check_finds_what_it_is_for(source, expected, tmp_path, monkeypatch):
    path = tmp_path / "wrong.py"
    path.write_text(source)
    monkeypatch.setitem(MODULES, "kvjax.cache.wrong", path)
    found = list(violations("kvjax.cache.wrong"))
    assert len(found) == (expected is not None)
    assert expected is None or expected in found[0]
