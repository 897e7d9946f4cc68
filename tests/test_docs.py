"""The pages of docs/ that show code are run."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from kvjax.cache.layer_cache import LayerCache
from kvjax.cache.layout import CacheDims
from kvjax.cache.step import Step

DOCS = Path(__file__).parents[1] / "docs"


def test_add_a_method_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "add_a_method.md").read_text(), re.DOTALL)
    module = types.ModuleType("add_a_method")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # dataclasses look their module up
    names = module.__dict__
    for block in blocks:
        exec(compile(block, "docs/add_a_method.md", "exec"), names)
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
    norms = jnp.linalg.norm(step.keys, axis=-1).swapaxes(1, 2)
    body = cache.body.positions
    kept = jnp.take_along_axis(norms, jnp.maximum(body, 0), axis=2).max(-1, where=body >= 0, initial=0)
    candidates = jnp.arange(2, 12)
    lost = jnp.where(~(candidates[None, None, :, None] == body[:, :, None]).any(-1), norms[:, :, 2:12], jnp.inf).min(-1)
    assert (body >= 0).sum() == 2 * 2 * 2, "8 tokens: 2 sinks, 4 recent, 2 in the body of each head"
    assert (kept <= lost).all()
