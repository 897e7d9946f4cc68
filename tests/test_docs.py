"""The pages of docs/ that show code are run."""

from __future__ import annotations

import inspect
import re
import sys
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.cache.layer_cache import LayerCache
from kvjax.cache.layout import CacheDims
from kvjax.cache.policy import key_diff
from kvjax.cache.step import Step

DOCS = Path(__file__).parents[1] / "docs"


def run(page: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that a page's Python defines."""
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / f"{page}.md").read_text(), re.DOTALL)
    module = types.ModuleType(page)
    monkeypatch.setitem(sys.modules, module.__name__, module)  # dataclasses look their module up
    for block in blocks:
        exec(compile(block, f"docs/{page}.md", "exec"), module.__dict__)
    return module.__dict__


def test_add_a_kernel_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    names = run("add_a_kernel", monkeypatch)
    keys, values, q, valid = (np.asarray(names[x], np.float64) for x in ("keys", "values", "q", "valid"))
    scale = np.asarray(names["stored"].scale, np.float64)[..., None]
    logits = np.einsum("bkrh,bksh->bkrs", q, np.where(keys > 0, scale, -scale)) * 32**-0.5
    weights = np.where(valid[:, :, None] > 0, np.exp(logits), 0.0)
    out = np.einsum("bkrs,bksh->bkrh", weights, values) / weights.sum(-1, keepdims=True)
    np.testing.assert_allclose(names["out"], out, atol=1e-5)
    np.testing.assert_allclose(names["lse"], np.log(weights.sum(-1)), atol=1e-5)


def test_add_a_method_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    names = run("add_a_method", monkeypatch)
    dims = CacheDims(batch=2, kv_heads=2, query_heads=4, head_dim=8, max_length=24, prompt_length=16, dtype="float32")
    keys = jax.random.split(jax.random.key(0), 3)
    step = Step(
        queries=jax.random.normal(keys[0], (2, 16, 4, 8)),
        keys=jax.random.normal(keys[1], (2, 16, 2, 8)),
        values=jax.random.normal(keys[2], (2, 16, 2, 8)),
        positions=jnp.broadcast_to(jnp.arange(16), (2, 16)),
        valid=jnp.ones((2, 16), bool),
    )
    _, cache = LayerCache.init(names["method"], dims).step(step)
    body = np.asarray(cache.body.positions)
    for b, k in np.ndindex(2, 2):
        unit = np.asarray(step.keys[b, :, k], np.float64)
        unit /= np.linalg.norm(unit, axis=-1, keepdims=True)
        candidates = list(range(2, 12))
        best = sorted(candidates, key=lambda p: unit[p] @ unit.mean(0))[:2]
        assert sorted(p for p in body[b, k] if p >= 0) == sorted(best), "8 tokens: 2 sinks, 4 recent, 2 in the body"


def test_the_policy_of_the_page_is_the_one_of_the_tree() -> None:
    assert inspect.getsource(key_diff).strip() in (DOCS / "add_a_method.md").read_text()
