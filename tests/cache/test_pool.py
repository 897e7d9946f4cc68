"""Pages of a pool: how large they are, what they take, and that their size changes nothing that is read."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from kvjax.cache import pool
from kvjax.cache.codec import Codec, Identity, Integer
from kvjax.cache.layer_cache import LayerCache
from kvjax.cache.layout import CacheDims
from kvjax.cache.methods import parse
from kvjax.cache.plan import layer_bytes
from kvjax.cache.pool import Pool, page_slots
from tests.cache.driver import Setup, dims_of, draw, run

LARGE = CacheDims(batch=2, kv_heads=4, query_heads=16, head_dim=128, max_length=8192, prompt_length=8000)
INT4 = Integer(bits=4, symmetric=False, group=32)


def pool_of(method: str, dims: CacheDims = LARGE) -> tuple[LayerCache, Pool]:
    cache = jax.eval_shape(lambda: LayerCache.init(parse(method), dims))
    assert cache.pool is not None
    return cache, cache.pool


@pytest.mark.parametrize(
    ("platform", "codec", "tokens", "slots"),
    [
        ("cpu", Identity(), 1023, 32),
        ("cpu", Identity(), 1024, 128),
        ("cpu", INT4, 1024, 128),
        ("tpu", Identity(), 1024, 128),
        ("tpu", INT4, 1024, 32),
        ("tpu", INT4, 2047, 32),
        ("tpu", INT4, 2048, 256),
        ("tpu", dataclasses.replace(INT4, bits=2), 4096, 512),
    ],
)
def test_pages_are_large_where_heads_have_eight_of_them(
    platform: str, codec: Codec, tokens: int, slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large ones are what a kernel can cut out of the platform's layout of the codes."""
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    assert page_slots(LARGE, tokens, codec, codec) == slots


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("method", ["adakv:share=0.5", "adakv:share=0.5+int4", "adakv:tokens=200+int8"])
def test_bytes_are_those_of_the_budget(method: str, platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As planned, and no more than a page per head beyond the budget."""
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    cache, made = pool_of(method)
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache)) == layer_bytes(parse(method), LARGE)
    each = made.pages.slots
    budget = cache.method.budget.tokens(LARGE.prompt_length)
    assert each == (32 if "200" in method else 256 if (platform, "int4" in method) == ("tpu", True) else 128)
    assert made.owner.shape[1] * each <= LARGE.kv_heads * (budget + 2 * each)


@pytest.mark.parametrize(
    "method", ["adakv:tokens=40,window=8", "adakv:tokens=40,window=8+int4:group=16", "kvzip:tokens=40"]
)
def test_the_size_of_pages_changes_nothing(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = draw(41, (64, 45, 17, 1), padded=64, decoded=8, query_heads=8)
    found = []
    for slots in (8, 16, 64):
        monkeypatch.setattr(pool, "PAGE", slots)
        named = dataclasses.replace(parse(method), name=f"pages of {slots}")  # so that it is compiled anew
        made = pool_of(method, dims_of(inputs))[1]
        assert made.pages.slots == slots
        found.append(run(Setup(named, dims_of(inputs)), inputs))
    for other in found[1:]:
        np.testing.assert_allclose(other.outputs, found[0].outputs, atol=1e-5, rtol=1e-5)
